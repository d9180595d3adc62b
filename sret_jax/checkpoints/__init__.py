"""Saving, restoring and converting weights and training state."""
