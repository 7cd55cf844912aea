"""Many adapters on one base: engine, adapter pool, gateway, evaluation."""
