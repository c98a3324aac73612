"""The training loop and its parts: schedule, checkpoints, weight averaging, noise, teachers."""
