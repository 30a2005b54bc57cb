"""From a graph to a callable."""
