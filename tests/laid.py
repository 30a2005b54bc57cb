"""Tensors that lie anyhow in memory."""

import random

import torch


def laid(draw: random.Random, x: torch.Tensor, expanded: bool = False) -> torch.Tensor:
    """The values of ``x`` in any order in memory, with steps, gaps and an offset; or those of a
    part, ``expanded``."""
    if not x.dim():
        return torch.stack([x, x])[1] if draw.random() < 0.5 else x.clone()
    order = draw.sample(range(x.dim()), x.dim()) if draw.random() < 0.8 else list(range(x.dim()))
    memory = x.permute(order)
    if expanded:
        for d in range(x.dim()):
            memory = memory.narrow(d, 0, 1) if draw.random() < 0.5 and memory.shape[d] else memory
    sizes, cut = list(memory.shape), [slice(None)] * x.dim()
    for d in range(x.dim()):
        kind = draw.randrange(8)
        if kind == 0:
            sizes[d], cut[d] = sizes[d] + 1, slice(1, None)
        elif kind == 1:
            sizes[d], cut[d] = 2 * sizes[d], slice(None, None, 2)
    placed = memory.new_zeros(sizes)[tuple(cut)].copy_(memory)
    return placed.expand([x.shape[d] for d in order]).permute(
        sorted(range(x.dim()), key=order.__getitem__)
    )
