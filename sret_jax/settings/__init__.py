"""The config that a run stores, and the model that it describes."""
