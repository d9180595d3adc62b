"""Accuracy, predictions and confusion."""
