"""Regularizers of a Run: one pure function a file, and `losses` and `step`, which call them in the training loop."""
