"""Evaluation of many adapters on one base: tasks, answers, scores, and what differs."""
