"""Measuring: distances of sets of features, what is asked of a model (`protocols`), and the page that says it (`report`)."""
