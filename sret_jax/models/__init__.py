"""The mathematics of SReT, and nothing else."""
