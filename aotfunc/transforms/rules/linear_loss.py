"""Rules of ``linear_cross_entropy`` in chunks, whose own backwards take for constants what they
read.

A row's loss is ``c (logsumexp(z) - z[target])`` with logits ``z = x w' + bias``; ``c`` is the
weight of its target, for a mean divided by the sum of these. Weights are constants, as in eager
mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import picked_weights
from .table import rules_of, total, vjp_of, wrong_in_autograd

Gradients = tuple[Tensor, Tensor, Tensor]  # by x, by w and by the bias


def by_chunks(part: Callable[..., Gradients], chunk: int, *rows: Tensor) -> Gradients:
    """Return the gradients of a sum over the rows from those of ``chunk`` rows at a time."""
    parts = zip(*(t.split(chunk) for t in rows), strict=True)
    of_x, of_w, of_bias = zip(*(part(*some) for some in parts), strict=True)
    return torch.cat(of_x), reduce(torch.add, of_w), reduce(torch.add, of_bias)


def residue(p: Tensor, target: Tensor) -> Tensor:
    """Return the derivative of ``logsumexp(z) - z[target]`` by ``z``; ``p`` is its softmax."""
    return p.scatter_add(1, target.unsqueeze(1), -torch.ones_like(p[:, :1]))


class Loss:
    """The sum of the rows' losses, each times a factor of ``scale``, in the dtype in which the op
    adds."""

    def __init__(
        self,
        tensors: Sequence[Any],
        ignore: int,
        chunk: int,
        dtype: torch.dtype,
    ) -> None:
        x, w, target, bias, weight = tensors
        self.x, self.w = x.to(dtype), w.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.c = picked_weights(self.x, target, weight, ignore, False)
        self.target = target.masked_fill(target == ignore, 0)
        self.chunk = chunk

    def softmax(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.bias).softmax(1)

    def gradients(self, scale: Tensor) -> Gradients:
        def part(x: Tensor, target: Tensor, c: Tensor) -> Gradients:
            s = c.unsqueeze(1) * residue(self.softmax(x), target)
            return s @ self.w, s.mT @ x, s.sum(0)

        return by_chunks(part, self.chunk, self.x, self.target, self.c * scale)

    def second(self, scale: Tensor, dx: Tensor, dw: Tensor, dbias: Tensor) -> Gradients:
        """Return the gradients of the sum's derivative along ``(dx, dw, dbias)``."""

        def part(x: Tensor, target: Tensor, c: Tensor, dx: Tensor) -> Gradients:
            p, c = self.softmax(x), c.unsqueeze(1)
            dz = dx @ self.w.mT + x @ dw.mT + dbias
            h = c * p * (dz - (p * dz).sum(1, keepdim=True))
            s = c * residue(p, target)
            return h @ self.w + s @ dw, h.mT @ x + s.mT @ dx, h.sum(0)

        return by_chunks(part, self.chunk, self.x, self.target, self.c * scale, dx)


@rules_of("torch_nn")
def state_rules() -> None:
    """State the rules, when the module of torch that defines the ops is imported."""
    chunked = torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default
    unreduced = torch.ops.torch_nn._linear_cross_entropy_batch_chunked_no_reduction.default
    wrong_in_autograd("all", chunked, unreduced)

    @vjp_of(unreduced)
    def _(g, out, *args):
        *tensors, ignore, chunk, policy, dtype = args
        loss = Loss(tensors, ignore, chunk, dtype)
        of_x, of_w, of_bias = loss.gradients(g.to(dtype))
        return of_x, of_w, None, of_bias

    @vjp_of(chunked)
    def _(g, out, *args, needs):
        reduction, ignore, smoothing, chunk, policy, dtype, retain, *saved = args[5:]
        loss = Loss(args[:5], ignore, chunk, dtype)
        scale = 1 / loss.c.sum() if reduction == "mean" else loss.c.new_ones(())
        wanted = needs[0], needs[1], needs[3]
        of: Any = [None] * 3
        if g[0] is not None:
            known = out[1:]
            if any(want and not has for want, has in zip(wanted, saved, strict=True)):
                known = loss.gradients(scale)
            of = [k * g[0] if want else None for k, want in zip(known, wanted, strict=True)]
        along = [a if has else None for a, has in zip(g[1:], saved, strict=True)]
        if any(a is not None for a in along):
            like = loss.x, loss.w, loss.w[:, 0]
            along = [
                torch.zeros_like(x) if a is None else a.to(dtype)
                for a, x in zip(along, like, strict=True)
            ]
            of = list(map(total, of, loss.second(scale, *along)))
        return of[0], of[1], None, of[2]
