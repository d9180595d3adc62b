"""The records, classes and splits of a data set."""
