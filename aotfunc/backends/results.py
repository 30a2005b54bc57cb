"""Compare the results of compiled code with those that a graph promises, and repair them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx import Node

from ..errors import BackendError, GraphError
from ..trace.node_views import storage_root
from ..trace.shapes.sig import reach

#: a tensor, found or made from ``(arguments, results)``
Pick = Callable[[Sequence, Sequence], Tensor]
#: (number of a result, what to return in its place)
Repair = tuple[int, Pick]


class Results:
    """Shapes, dtypes and strides of a graph's results, and the values whose memory they show.

    A free compiler may lay a result out otherwise, and may return an input, or one result's memory
    twice, for values that are equal. It does the same at every call, so :meth:`repairs` looks at
    the first."""

    def __init__(self, graph: fx.Graph) -> None:
        self.outputs = list(next(iter(reversed(graph.nodes))).args[0])
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.vals = [o.meta["val"] if isinstance(o, Node) else o for o in self.outputs]
        self.roots = [storage_root(o) for o in self.outputs]

    def repairs(self, args: Sequence, outs: Sequence) -> list[Repair]:
        """List the repairs that these results need at every call. Raises GraphError."""
        found: list[Repair] = []
        owners: dict[int, list[tuple[Node, Pick]]] = {}  # address -> the values in that memory
        for i, a in enumerate(args):
            if address := address_of(a):
                owners.setdefault(address, []).append((self.placeholders[i], argument(i)))
        for k, (out, val) in enumerate(zip(outs, self.vals, strict=True)):
            if not isinstance(out, Tensor):
                continue
            if out.dtype is not val.dtype or out.shape != val.shape:
                got, want = f"{out.dtype}{list(out.shape)}", f"{val.dtype}{list(val.shape)}"
                raise GraphError(
                    f"result {k} of the compiled code is {got}, the graph says {want}"
                )
            there = owners.setdefault(address, []) if (address := address_of(out)) else []
            owner = next((pick for n, pick in there if n is self.roots[k]), None)
            base = owner and owner(args, outs)
            laid_out = out.stride() == tuple(val.stride())
            if owner and base is not None and base.dtype is out.dtype and laid_out:
                if base is not out:
                    found.append((k, view(owner, base, out)))
            elif there or not laid_out:
                found.append((k, copy(k, tuple(val.shape), tuple(val.stride()))))
            else:
                there.append((self.roots[k], result(k)))
        return found


def takes_a_list(fn: Callable) -> bool:
    """Return whether a compiler's function is marked as one of a list of inputs. AOTAutograd's for
    a module has the mark of the one that it calls, and takes them one by one."""
    of_a_module = inspect.isfunction(fn) and hasattr(fn, "zero_grad")
    return getattr(fn, "_boxed_call", False) and not of_a_module


def listing_results(fn: Callable, boxed: bool, outputs: Sequence, whose: str) -> Callable:
    """Return a compiler's function as one of a list of inputs that returns a sequence. It raises
    BackendError where that has not a result for each of a graph's ``outputs``."""

    def call(args: list[Tensor]) -> Sequence:
        outs = fn(args) if boxed else fn(*args)
        outs = outs if isinstance(outs, list | tuple) else (outs,)
        if (count := len(outs)) != len(outputs):
            raise BackendError(f"{whose} returned {count} results, the graph has {len(outputs)}")
        if any([o is None and n is not None for o, n in zip(outs, outputs, strict=True)]):
            raise BackendError(f"{whose} returned None for a tensor")
        return outs

    call.eagerly = getattr(fn, "eagerly", None)  # type: ignore[attr-defined]
    return call


def address_of(t: Tensor) -> int:
    """Return the address of a tensor's memory, 0 where it has none."""
    return t.untyped_storage().data_ptr() if t.numel() and t.layout is torch.strided else 0


def argument(i: int) -> Pick:
    return lambda args, outs: args[i]


def result(k: int) -> Pick:
    return lambda args, outs: outs[k]


def view(owner: Pick, base: Tensor, out: Tensor) -> Pick:
    """Return the repair that makes ``out`` a view of ``base``, an argument or an earlier result,
    so that autograd notices writes to it if ``base`` is saved."""
    size, stride, start = out.shape, out.stride(), out.storage_offset() - base.storage_offset()

    def shown(args: Sequence, outs: Sequence) -> Tensor:
        now = owner(args, outs).detach()
        return now.as_strided(size, stride, now.storage_offset() + start)

    return shown


def copy(k: int, size: tuple, stride: tuple) -> Pick:
    """Return a copy of result ``k`` in the graph's layout."""

    def copied(args: Sequence, outs: Sequence) -> Tensor:
        out = outs[k]
        return torch.empty_strided(size, stride, dtype=out.dtype, device=out.device).copy_(out)

    return copied


def is_lazy(t: Tensor) -> bool:
    """Return whether memory does not hold the values: they are to be conjugated or negated."""
    return t.is_neg() or t.is_conj()


def resolved(t: Tensor) -> Tensor:
    """Return the tensor with its conjugation or negation carried out, laid out as before."""
    return (
        t.as_strided((reach(t.shape, t.stride()),), (1,))
        .resolve_conj()
        .resolve_neg()
        .as_strided(t.shape, t.stride(), 0)
    )
