"""Which run next: coordinate descent over the grid. No torch."""
