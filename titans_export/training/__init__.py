"""Training: the data, the loop, the checkpoint."""
