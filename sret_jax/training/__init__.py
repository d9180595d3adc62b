"""One training step and everything it needs."""
