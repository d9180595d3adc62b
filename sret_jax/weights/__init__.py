"""Reads weights from any path, and writes them."""
