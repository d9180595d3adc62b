"""Meshes, shardings and the start-up of several processes."""
