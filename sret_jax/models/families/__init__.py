"""One file a network."""
