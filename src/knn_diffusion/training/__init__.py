"""Training of the three parts: one objective each, one loop for all."""
