"""Conditions for using a compiled entry again: keys of arguments and surroundings, and the Python
state that is read."""
