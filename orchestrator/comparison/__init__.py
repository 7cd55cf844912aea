"""Runs side by side: what they differ in, and what came of it."""
