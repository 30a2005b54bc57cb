"""Infer results of ops without running them: signatures, shape rules, kernels on meta tensors."""
