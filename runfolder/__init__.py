"""What a run is: its job, the chain of its attempts, and the files that they write."""
