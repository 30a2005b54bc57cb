"""Tensors of random numbers for tests, by dtype."""

import torch


def f64(*shape):
    return torch.randn(shape, dtype=torch.float64)


def f32(*shape):
    return torch.randn(shape)


def same(*shape):
    """The same numbers at each call of one shape."""
    torch.manual_seed(0)
    return f32(*shape)
