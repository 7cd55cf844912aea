"""One file per fine-tuning method."""
