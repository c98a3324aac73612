"""Records to claims, tables, figures and pages. No torch."""
