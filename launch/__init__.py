"""Submission to Slurm. Imports epochal; nothing in epochal imports it at module level."""
