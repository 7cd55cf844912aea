"""What several methods share, or one is made of."""
