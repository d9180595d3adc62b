"""The mathematics, and nothing else."""
