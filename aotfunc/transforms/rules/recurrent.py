"""Batching of oneDNN's recurrent layer: folded into the sequences' own batch, or step by step
where weights differ.

Sequences are ``(T, N, I)`` (also with ``batch_first``: the layer's caller has turned them), states
``(N, H)``. Recurrent layers on other kernels are recorded as what they consist of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import all_batched, into, out_of
from .schema import aten
from .table import vmap_of

LSTM = 2  # value of the argument `mode`


def lstm_layer(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h: Tensor, c: Tensor, reverse: bool
) -> tuple:
    """A batch of layers ``[B, T, N, I]``, each with its weights: outputs ``[B, T, N, H]`` and the
    last states."""
    of_input = x @ w_x.mT.unsqueeze(1) + bias.unsqueeze(1).unsqueeze(1)
    steps = range(x.shape[1])
    rows: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        i, f, g, o = (of_input[:, t] + h @ w_h.mT).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        rows.append(h)
    return torch.stack(rows[::-1] if reverse else rows, 1), h, c


@vmap_of(aten.mkldnn_rnn_layer)
def _(*args: Any, batched: Any, size: Any) -> Any:
    tensors, (reverse, batch_sizes, mode, *rest) = args[:7], args[7:]
    has_biases = rest[2]
    if batch_sizes or mode != LSTM:
        return NotImplemented
    x, *weights, h, c = tensors
    x, h, c = all_batched((x, h, c), (batched[0], *batched[5:]), size)
    if not any(batched[1:5]):
        # contiguous, as the kernel takes them to be without looking
        x, h_in, c_in = (
            into(t, d).contiguous() for t, d in ((x, 1), (h, h.dim() - 3), (c, c.dim() - 3))
        )
        out, h_end, c_end, _ = aten.mkldnn_rnn_layer(
            x, *weights, h_in, c_in, reverse, batch_sizes, mode, *rest
        )
        out = out_of(out, 1, size)
        h_end, c_end = out_of(h_end, h.dim() - 3, size), out_of(c_end, c.dim() - 3, size)
    else:
        w_x, w_h, b_x, b_h = all_batched(weights, batched[1:5], size)
        ends = (h.reshape(size, *h.shape[-2:]), c.reshape(size, *c.shape[-2:]))
        bias = b_x + b_h if has_biases else x.new_zeros(size, w_x.shape[1])
        out, h_end, c_end = lstm_layer(x, w_x, w_h, bias, *ends, reverse)
        h_end, c_end = h_end.reshape(h.shape), c_end.reshape(c.shape)
    # the workspace is not read
    return out, h_end, c_end, torch.empty(size, 0, dtype=torch.uint8, device=x.device)
