"""A stored image becomes pixels."""
