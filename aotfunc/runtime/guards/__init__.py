"""When a compiled entry may be used again: keys of arguments and surroundings, and the Python
state that is read."""
