"""Training: optimizer, processes, checkpoints, metrics, evaluation. Runs the method."""
