"""What a run reported, and how MLflow comes to know it."""
