"""Accuracy, predictions and confusion matrices."""
