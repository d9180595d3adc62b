"""Flax modules, and what can be computed about a model without data."""
