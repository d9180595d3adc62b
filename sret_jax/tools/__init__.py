"""Command-line tools: python -m sret_jax.tools.NAME."""
