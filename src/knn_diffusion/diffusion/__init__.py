"""Discrete diffusion over image tokens: no weights, no files, only functions of tensors (Sec. 3.1, 3.2)."""
