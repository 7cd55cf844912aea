"""Sweeps: many runs of one job under other settings, by a rule and within a budget."""
