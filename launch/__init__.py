"""Submission to a cluster, beside the package: nothing in src/epochal imports it."""
