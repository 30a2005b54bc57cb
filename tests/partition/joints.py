"""Joint graphs for the tests: traced with torch's own tools, or built by hand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from aotfunc.partition.cost import Roofline, nbytes
from aotfunc.partition.ops import base

aten = torch.ops.aten


def as_list(x: Any) -> list[Any]:
    return list(x) if isinstance(x, tuple | list) else [x]


class JointOf:
    """The joint graph of ``f`` at these inputs, and what eager autograd says about it."""

    def __init__(
        self, f: Callable[..., Any], *primals: Any, mode: str = "fake", params: Sequence[int] = ()
    ) -> None:
        self.f, self.primals = f, list(primals)
        self.wanted = [isinstance(p, Tensor) and p.requires_grad for p in primals]
        outputs = as_list(f(*primals))
        self.num_outputs = len(outputs)
        torch.manual_seed(7)
        self.tangents = [torch.randn_like(o) for o in outputs if o.requires_grad]

        def run(
            primals: list[Any], tangents: list[Tensor]
        ) -> list[Any]:  # its names are what torch's partitioners read
            return self.run(primals, tangents)

        self.module = make_fx(run, tracing_mode=mode)(self.primals, self.tangents)
        self.module.graph.set_codegen(fx.graph.CodeGen())
        self.module.recompile()
        for n, p in zip(self.placeholders(), range(len(primals)), strict=False):
            n.meta["role"] = "param" if p in params else "primal"
        for n in self.placeholders()[len(primals) :]:
            n.meta["role"] = "tangent"

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.module.graph.nodes if n.op == "placeholder"]

    def run(self, primals: list[Any], tangents: list[Tensor]) -> list[Any]:
        primals = [
            p.detach().requires_grad_() if w else p
            for p, w in zip(primals, self.wanted, strict=True)
        ]
        outputs = as_list(self.f(*primals))
        ends = [o for o in outputs if o.requires_grad]
        leaves = [p for p, w in zip(primals, self.wanted, strict=True) if w]
        found = iter(
            torch.autograd.grad(ends, leaves, tangents, allow_unused=True)
            if ends
            else [None] * len(leaves)
        )
        return [o.detach() for o in outputs] + [next(found) if w else None for w in self.wanted]

    def check(
        self, split: Callable[..., Any], primals: Any = None, tangents: Any = None, **options: Any
    ) -> Any:
        """Split, run both parts, compare with eager bit for bit; return the two modules."""
        fw, bw = split(self.module, num_fwd_outputs=self.num_outputs, **options)
        primals = self.primals if primals is None else primals
        tangents = self.tangents if tangents is None else tangents
        torch.manual_seed(3)
        wanted = self.run(primals, tangents)
        torch.manual_seed(3)
        plain = [p.detach() if isinstance(p, Tensor) else p for p in primals]
        outputs = fw(*plain)
        gradients = bw(*outputs[self.num_outputs :], *tangents)
        got = [*outputs[: self.num_outputs], *gradients]
        assert len(got) == len(wanted)
        for g, w in zip(got, wanted, strict=True):
            if w is None:
                assert g is None
            else:
                torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
        return fw, bw


def saved(fw: fx.GraphModule, num_outputs: int) -> list[fx.Node]:
    return list(next(iter(reversed(fw.graph.nodes))).args[0][num_outputs:])


def kept_bytes(fw: fx.GraphModule, num_outputs: int) -> int:
    """Bytes of the distinct storages that the forward made and hands over; works for torch's
    partitions as well."""
    owners = {
        base(n) for n in saved(fw, num_outputs) if not isinstance(n.meta["val"], torch.SymInt)
    }
    return sum(nbytes(n.meta["val"]) for n in owners if n.op != "placeholder")


def doubled(fw: fx.GraphModule, bw: fx.GraphModule) -> list[fx.Node]:
    """The nodes of the backward that ran in the forward already and take time."""
    early = {n.name for n in fw.graph.nodes}
    return [
        n
        for n in bw.graph.nodes
        if n.op == "call_function" and n.name in early and Roofline().time(n)
    ]


def targets(gm: fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


# ----- by hand -----------------------------------------------------------------------------------


def sig(
    *shape: int, dtype: torch.dtype = torch.float32, stride: tuple[int, ...] | None = None
) -> SimpleNamespace:
    """A signature: no tensor, only what it looks like."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return SimpleNamespace(
        shape=shape, stride=stride or tuple(reversed(strides)), dtype=dtype, device="cpu"
    )


class Hand:
    """A joint graph written down node by node; every value is a signature of one shape unless said
    otherwise."""

    def __init__(self, *shape: int) -> None:
        self.graph, self.val = fx.Graph(), sig(*(shape or (4,)))

    def input(self, name: str, role: str | None = "primal", **meta: Any) -> fx.Node:
        n = self.graph.placeholder(name)
        n.meta.update(val=self.val, **({"role": role} if role else {}), **meta)
        return n

    def __call__(self, target: Any, *args: Any, val: Any = None, **meta: Any) -> fx.Node:
        name = (
            target._schema.name.split("::")[1] if hasattr(target, "_schema") else target.__name__
        )
        n = self.graph.create_node("call_function", target, args, name=name)
        n.meta.update(val=self.val if val is None else val, **meta)
        return n

    def item(self, n: fx.Node, i: int) -> fx.Node:
        return self(operator.getitem, n, i, val=n.meta["val"][i])

    def module(self, outputs: Sequence[Any], root: Any = None) -> fx.GraphModule:
        self.graph.output(tuple(outputs))
        return fx.GraphModule(root or torch.nn.Module(), self.graph)
