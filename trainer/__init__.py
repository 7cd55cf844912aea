"""What runs on every worker: data, objective, ZeRO, loop, checkpoint."""
