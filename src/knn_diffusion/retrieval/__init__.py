"""Nearest images: the store (truth), the index derived from it, and the de-duplication of A.4."""
