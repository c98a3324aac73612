"""Plan, claim, run, show and stop jobs. Planning imports no torch."""
