"""Results of ops, told without running them: signatures, own shape rules, kernels on meta
tensors."""
