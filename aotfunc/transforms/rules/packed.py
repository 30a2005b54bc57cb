"""Pad packed sequences in a form that a recording can take: C++ reads the steps' sizes and fills
in a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded_sequences(
    data: Tensor, sizes: Tensor, batch_first: bool, value: float, length: int
) -> tuple[Tensor, Tensor]:
    """Return ``(T, N, *)`` of ``data``, in which step t has the next ``sizes[t]`` rows, and the
    length of each sequence; N before T with ``batch_first``. ``value`` fills the ``length`` steps
    after a sequence's end."""
    steps = sizes.tolist()
    start, rows, there = 0, [], []
    for n in [*steps, *[0] * (length - len(steps))]:
        rows.append([*range(start, start + n), *[0] * (steps[0] - n)])
        there.append([k < n for k in range(steps[0])])
        start += n
    lengths = torch.tensor([sum(n > k for n in steps) for k in range(steps[0])], device="cpu")
    mask = torch.tensor(there, device=data.device).reshape(
        length, steps[0], *[1] * (data.dim() - 1)
    )
    picked = data.index_select(0, torch.tensor(rows, device=data.device).flatten())
    out = torch.where(mask, picked.view(length, steps[0], *data.shape[1:]), value)
    return out.transpose(0, 1) if batch_first else out, lengths
