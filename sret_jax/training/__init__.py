"""The training step and everything it needs."""
