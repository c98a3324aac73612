"""Losses of models and ensembles, subsets, member weights, downstream tasks."""
