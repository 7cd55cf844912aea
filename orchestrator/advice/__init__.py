"""Advice for a job: what evidence supports, which methods fit, and a race of them on the rows of the user."""
