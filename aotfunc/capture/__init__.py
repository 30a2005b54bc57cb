"""Capture Python functions as programs."""
