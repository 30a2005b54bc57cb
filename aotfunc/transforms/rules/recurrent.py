"""Rules of oneDNN's recurrent layer: one LSTM in one direction, by its kernels if they serve, else
by formulas step by step.

Sequences are ``(T, N, I)`` (also with ``batch_first``: the layer's caller transposes them), states
``(N, H)``. Recurrent layers on other kernels are recorded as their parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batching import all_batched, into, out_of
from .schema import aten
from .table import decompose_as, jvp_of, total, vjp_of, vmap_of

LSTM = 2  # value of the argument `mode`
WORKSPACE = 3  # the result that only a backward reads

layer = aten.mkldnn_rnn_layer.default
_library = torch.library.Library("aotfunc", "FRAGMENT")
_library.define(
    str(layer._schema).replace("aten::mkldnn_rnn_layer", "mkldnn_rnn_layer_with_workspace")
)


def _with_workspace(*args: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
        return layer(*args)


_library.impl("mkldnn_rnn_layer_with_workspace", _with_workspace, "CPU")
_library.impl("mkldnn_rnn_layer_with_workspace", layer, "Meta")
#: the layer with all its results: under ``no_grad`` aten's leaves out the workspace, which its
#: backward reads
layer_with_workspace = torch.ops.aotfunc.mkldnn_rnn_layer_with_workspace.default


# ----- derivatives -------------------------------------------------------------------------------


@vjp_of(layer, layer_with_workspace, diff_outputs=(0, 1, 2))
def _(g: tuple, out: tuple, *args: Any) -> Any:
    tensors, (reverse, batch_sizes, mode, hidden, count, *rest) = args[:7], args[7:]
    biases, bidirectional, batch_first, train = rest
    options = (reverse, mode, hidden, count, biases, train, bidirectional, batch_sizes)
    gx, gw_x, gw_h, gb, _, gh, gc = aten.mkldnn_rnn_layer_backward(
        *(*tensors, *out[:3], *g[:3], *options, batch_first), workspace=out[WORKSPACE]
    )
    return gx, gw_x, gw_h, gb, gb, gh, gc


def only_lstm(mode: int, batch_sizes: list[int]) -> None:
    """Refuse arguments with which PyTorch never calls the layer."""
    if mode != LSTM or batch_sizes:
        raise NotImplementedError("it is derived for an LSTM of sequences of one length")


class Steps:
    """The values of all steps of a layer, given its hidden states, in the order of the steps."""

    def __init__(self, tensors: tuple, out: Tensor, has_biases: bool, reverse: bool) -> None:
        x, w_x, w_h, b_x, b_h, h, c = tensors
        self.reverse = reverse
        self.x, left = self.ordered(x), self.ordered(out)
        self.h = torch.cat([h.unsqueeze(0), left[:-1]])  # before each step
        sums = self.x @ w_x.mT + self.h @ w_h.mT
        i, self.f, g, o = gates(sums + b_x + b_h if has_biases else sums)
        cells = [c]
        for f, i_g in zip(self.f.unbind(), (i * g).unbind(), strict=True):
            cells.append(f * cells[-1] + i_g)
        start, tanh_c = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh()
        slopes = g * i * (1 - i), start * self.f * (1 - self.f), i * (1 - g * g)
        #: derivatives of the cell state by the sums of three gates, and of the hidden state by the
        #: sum of the output gate
        self.by_sums = torch.cat([*slopes, tanh_c * o * (1 - o)], -1)
        #: the derivative of the hidden state by the cell state
        self.by_c = o * (1 - tanh_c * tanh_c)

    def ordered(self, x: Tensor) -> Tensor:
        """Return ``x`` in the order of the steps, or from that back in the order of time."""
        return x.flip(0) if self.reverse else x


def gates(sums: Tensor) -> tuple[Tensor, ...]:
    """Return the input, forget, cell and output gates, of one step or of all."""
    i, f, g, o = sums.chunk(4, -1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


@jvp_of(layer, layer_with_workspace)
def _(tangents: tuple, out: tuple, *args: Any) -> Any:
    tensors, (reverse, batch_sizes, mode, _, _, has_biases, *_) = args[:7], args[7:]
    only_lstm(mode, batch_sizes)
    _, w_x, w_h, _, _, h, _ = tensors
    dx, dw_x, dw_h, db_x, db_h, dh, dc = tangents
    steps = Steps(tensors, out[0], has_biases, reverse)
    sums = total(
        torch.zeros_like(steps.by_sums),
        dx if dx is None else steps.ordered(dx) @ w_x.mT,
        dw_x if dw_x is None else steps.x @ dw_x.mT,
        dw_h if dw_h is None else steps.h @ dw_h.mT,
        *((db_x, db_h) if has_biases else ()),
    )
    dh, dc = (torch.zeros_like(h) if t is None else t for t in (dh, dc))
    left = []
    for t in range(len(sums)):
        *of_c, of_h = (steps.by_sums[t] * (sums[t] + dh @ w_h.mT)).chunk(4, -1)
        dc = steps.f[t] * dc + total(*of_c)
        dh = steps.by_c[t] * dc + of_h
        left.append(dh)
    return steps.ordered(torch.stack(left)), dh, dc, None


def layer_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return cotangents of the layer's tensors, step by step, without its workspace."""
    tensors, out, (g_out, g_h, g_c) = args[:7], args[7], args[10:13]
    reverse, mode, has_biases, batch_sizes = args[13], args[14], args[17], args[20]
    only_lstm(mode, batch_sizes)
    _, w_x, w_h, _, _, h, _ = tensors
    steps = Steps(tensors, out, has_biases, reverse)
    g_out = torch.zeros_like(out) if g_out is None else steps.ordered(g_out)
    g_h, g_c = (torch.zeros_like(h) if t is None else t for t in (g_h, g_c))
    sums = []
    for t in reversed(range(len(g_out))):
        g_h = g_h + g_out[t]
        g_c = g_c + steps.by_c[t] * g_h
        sums.append(steps.by_sums[t] * torch.cat([g_c, g_c, g_c, g_h], -1))
        g_h, g_c = sums[-1] @ w_h, steps.f[t] * g_c
    of_sums = torch.stack(sums[::-1])
    rows = of_sums.flatten(0, 1).mT
    g_x, g_b = steps.ordered(of_sums @ w_x), rows.sum(1)
    return (
        *(g_x, rows @ steps.x.flatten(0, 1), rows @ steps.h.flatten(0, 1)),
        *(g_b, g_b.clone(), g_h, g_c),
    )


decompose_as(aten.mkldnn_rnn_layer_backward, layer_backward)


# ----- batches -----------------------------------------------------------------------------------


def layers(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Any, h: Tensor, c: Tensor, reverse: bool
) -> tuple:
    """Run layers on ``[B, T, N, I]``; return outputs ``[B, T, N, H]`` and last states."""
    of_input = x @ w_x.mT.unsqueeze(1) + bias
    steps = range(x.shape[1])
    rows: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        i, f, g, o = gates(of_input[:, t] + h @ w_h.mT)
        c = f * c + i * g
        h = o * c.tanh()
        rows.append(h)
    return torch.stack(rows[::-1] if reverse else rows, 1), h, c


@vmap_of(layer, layer_with_workspace)
def _(*args: Any, batched: Any, size: Any, shape: Any) -> Any:
    (x, *weights, h, c), (reverse, batch_sizes, mode, *rest) = args[:7], args[7:]
    only_lstm(mode, batch_sizes)
    x, h, c = all_batched((x, h, c), (batched[0], *batched[5:]), size)
    if not any(batched[1:5]):
        x, h, c = into(x, 1), into(h, 0), into(c, 0)
        out, h, c, _ = layer(x, *weights, h, c, reverse, batch_sizes, mode, *rest)
        out, h, c = out_of(out, 1, size), out_of(h, 0, size), out_of(c, 0, size)
    else:
        w_x, w_h, b_x, b_h = all_batched(weights, batched[1:5], size)
        bias = (b_x + b_h).unsqueeze(1).unsqueeze(1) if rest[2] else 0
        out, h, c = layers(x, w_x, w_h, bias, h, c, reverse)
    # the workspace is not read
    return out, h, c, torch.empty(size, *shape[WORKSPACE], dtype=torch.uint8, device=x.device)
