"""Triton kernels and their launchers, one family per file. They launch; outputs are allocated by `triton_backend`."""
