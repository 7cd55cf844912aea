"""What is learned: an objective gives the sum of its loss over a micro-batch and the number of terms in the sum."""
