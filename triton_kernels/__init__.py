"""Triton kernels, one file per operation, each with its torch reference."""
