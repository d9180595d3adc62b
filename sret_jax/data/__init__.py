"""From stored images to batches: source -> order -> host transforms -> devices."""
