"""Jobs of several stages: read, submitted, and done one stage after another in one allocation."""
