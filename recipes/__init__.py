"""Recipes: one file per claim, each with `jobs`, `plan` and `report`, all pure functions of the records."""
