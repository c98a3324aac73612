"""Processes, parallelism presets, sharding of matrix optimizers, the check of the first step."""
