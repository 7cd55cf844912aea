"""Fine-tuning methods, one file each: what is trained of a base, how it is moved, and what is written in the end."""
