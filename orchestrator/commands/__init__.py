"""The commands, each in the file of its name or of its kind; orchestrator/cli.py puts them together."""
