"""Compiled programs on the CPU beside what others make of them; ``python -m benchmarks.cpu``."""
