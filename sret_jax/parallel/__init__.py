"""Device meshes and shardings, and the processes of a run."""
