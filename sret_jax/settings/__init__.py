"""The config that a run keeps, and the model that it describes."""
