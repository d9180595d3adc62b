"""Records, classes and splits of a data set."""
