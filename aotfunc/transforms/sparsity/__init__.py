"""Find which elements of a result depend on which elements of an input."""
