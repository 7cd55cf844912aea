"""Stages that write: rows get columns that the base answers or judges, by the principles of a file."""
