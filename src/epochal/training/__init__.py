"""One training loop and what it calls."""
