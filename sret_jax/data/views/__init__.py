"""Turns stored images into pixels."""
