"""Conditions for using an entry again: keys of arguments and surroundings, state read."""
