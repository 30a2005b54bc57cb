"""Run torch's recurrent layers as loops: one for each layer and direction, whatever the length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .control_flow import scan

State = tuple[Tensor, ...]  # a step's state, its output first


def tanh_cell(state: State, x: Tensor, h: Tensor) -> State:
    return ((x + h).tanh(),)


def relu(state: State, x: Tensor, h: Tensor) -> State:
    return ((x + h).relu(),)


def gru(state: State, x: Tensor, h: Tensor) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((state[0] - n) * z + n,)


def lstm(state: State, x: Tensor, h: Tensor) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


#: layer -> its next state, from the last one and the products of the weights with inputs and
#: outputs
STEPS = {"rnn_tanh": tanh_cell, "rnn_relu": relu, "gru": gru, "lstm": lstm}


def one_direction(
    name: str, x: Tensor, start: State, weights: Sequence[Tensor], reverse: bool
) -> tuple[State, Tensor]:
    """Return the last state and the outputs of one layer, for steps along dimension 0."""
    w_x, w_h, *biases = weights
    b_x, b_h = biases or (None, None)

    def step(state: State, x: Tensor) -> tuple[State, Tensor]:
        state = STEPS[name](state, x, F.linear(state[0], w_h, b_h))
        return state, state[0]

    return scan(step, start, F.linear(x, w_x, b_x), reverse=reverse)


def recurrent(
    name: str,
    x: Tensor,
    start: Any,
    weights: Sequence[Tensor],
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    both_ways: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Return the outputs and the last states, as the function of ``torch._VF`` does."""
    starts = [*zip(*([start] if isinstance(start, Tensor) else start), strict=True)]
    each, ways = 4 if bias else 2, 2 if both_ways else 1
    x, ends = x.transpose(0, 1) if batch_first else x, []
    for k in range(0, layers * ways, ways):
        if k and training and dropout:
            x = F.dropout(x, dropout)
        outs = []
        for i in range(k, k + ways):
            end, y = one_direction(name, x, starts[i], weights[each * i : each * (i + 1)], i > k)
            outs.append(y)
            ends.append(end)
        x = torch.cat(outs, -1) if both_ways else outs[0]
    states = [torch.stack(s) for s in zip(*ends, strict=True)]
    return (x.transpose(0, 1) if batch_first else x, *states)
