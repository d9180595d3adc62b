"""Stands before TensorFlow on the path of commands, so that they run as where it is missing."""

raise ModuleNotFoundError("TensorFlow is hidden from this command", name="tensorflow")
