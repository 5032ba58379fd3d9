"""Weights of other projects, read without running their code and written as our parts."""
