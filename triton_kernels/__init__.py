"""Triton kernels, one file per op, each with its torch reference."""
