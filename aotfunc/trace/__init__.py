"""Ops on traced values become a recording, and a recording becomes a graph."""
