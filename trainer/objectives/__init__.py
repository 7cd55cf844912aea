"""What is learned: a file for each objective, which a job chooses by its name."""
