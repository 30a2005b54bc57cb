"""From a Python function to a program."""
