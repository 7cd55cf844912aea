"""From rows of data to batches of tokens: what is read, what is learned, and in which order."""
