"""Compile graphs as kernels over axes, in C++ for the CPU."""
