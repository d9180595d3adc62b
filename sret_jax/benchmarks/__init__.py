"""Measurements of speed and memory: python -m sret_jax.tools.benchmark."""
