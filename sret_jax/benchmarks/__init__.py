"""What is measured: python -m sret_jax.tools.benchmark."""
