"""Measuring a model: the numbers (`metrics`), what is asked of it (`protocols`), and the page that says it (`report`)."""
