"""Graphs as kernels over axes, compiled as C++ for the CPU."""
