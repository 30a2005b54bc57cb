"""Collectives of torch.distributed that write into their arguments, recorded as functional ones
and writes that autograd does not see: as in eager mode, the old value's derivative stays."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..debug import at, user_line
from ..errors import CaptureError
from .autograd import needs_grad
from .nested import leaves

if TYPE_CHECKING:
    from .tracer import Trace

space = torch.ops._c10d_functional
#: functional collectives that ops of ``_c10d_functional_autograd`` call
DIFFERENTIATED = [
    getattr(space, name).default
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    if torch.distributed.is_available()
]
Writes = Iterable[tuple[Tensor, Tensor]]  # (written tensor, its value)


def all_reduce(xs: list[Tensor], group: Any, how: str, *_: Any) -> Writes:
    return [(x, space.wait_tensor(space.all_reduce(x, how, group.group_name))) for x in xs]


def broadcast(xs: list[Tensor], group: Any, source: int, *_: Any) -> Writes:
    return [(x, space.wait_tensor(space.broadcast(x, source, group.group_name))) for x in xs]


def all_gather_flat(out: Tensor, x: Tensor, group: Any, *_: Any) -> Writes:
    flat, size = x.reshape(-1), group.size()
    return [(out, space.wait_tensor(space.all_gather_into_tensor(flat, size, group.group_name)))]


def all_gather_lists(outs: list[list[Tensor]], xs: list[Tensor], group: Any, *rest: Any) -> Writes:
    for parts, x in zip(outs, xs, strict=True):
        ((_, flat),) = all_gather_flat(x, x, group, *rest)
        yield from zip(parts, flat.chunk(len(parts)), strict=True)


def reduce_scatter(out: Tensor, x: Tensor, group: Any, how: str, *_: Any) -> Writes:
    flat, size = x.reshape(-1), group.size()
    return [
        (out, space.wait_tensor(space.reduce_scatter_tensor(flat, how, size, group.group_name)))
    ]


def reduce_scatter_lists(
    outs: list[Tensor], xs: list[list[Tensor]], group: Any, how: str, *rest: Any
) -> Writes:
    for out, parts in zip(outs, xs, strict=True):
        yield from reduce_scatter(out, torch.stack(parts), group, how, *rest)


def all_to_all(
    out: Tensor, x: Tensor, group: Any, received: list[int], sent: list[int], *_: Any
) -> Writes:
    sizes = [s or [len(t) // group.size()] * group.size() for s, t in ((received, out), (sent, x))]
    return [(out, space.wait_tensor(space.all_to_all_single(x, *sizes, group.group_name)))]


#: op -> its writes
TABLE: dict[str, Callable[..., Writes]] = {
    "allreduce_": all_reduce,
    "broadcast_": broadcast,
    "_allgather_base_": all_gather_flat,
    "allgather_": all_gather_lists,
    "_reduce_scatter_base_": reduce_scatter,
    "reduce_scatter_": reduce_scatter_lists,
    "alltoall_base_": all_to_all,
}


def record_collective(trace: Trace, func: Any, args: tuple) -> Any:
    """Record a collective in place. Return its argument and finished work, as a graph waits inside
    the call.

    Raises CaptureError for a collective that is not in the table."""
    import torch.distributed._functional_collectives  # registers meta kernels

    name = func._schema.name.removeprefix("c10d::")
    what = f"torch.distributed's {name.strip('_')}{at(user_line())}"
    plain = [group_or_reduction(a) for a in args]
    if name not in TABLE or "premul_sum" in plain:
        raise CaptureError(
            f"{what} is not captured: all_reduce, broadcast, all_gather, reduce_scatter and "
            "all_to_all_single are; call it outside of the function"
        )
    tensors = [x for x in leaves(plain) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(map(needs_grad, tensors)):
        warnings.warn(
            f"{what} has no derivative, as in eager mode: what it writes to keeps the one that it "
            "had. The functions of torch.distributed._functional_collectives have derivatives",
            stacklevel=2,
        )
    written = []
    with trace, torch.no_grad():
        for out, value in TABLE[name](*plain):
            written.append(out)
            if (out.dtype, out.numel()) != (value.dtype, value.numel()):
                raise CaptureError(
                    f"{what} gives {value.numel()} elements of {value.dtype} to a tensor of "
                    f"{out.numel()} of {out.dtype}; pass one of the same dtype and size"
                )
            out.copy_(value.view(out.shape))
    work = finished(written)
    return work if len(func._schema.returns) == 1 else (args[0], work)


def finished(written: list[Tensor]) -> Any:
    """Return work that is completed, with the result ``written``."""
    future: Any = torch.futures.Future()
    future.set_result(written)
    return torch._C._distributed_c10d._create_work_from_future(future).boxed()


def group_or_reduction(a: Any) -> Any:
    """Return the process group in a script object, or the name of a reduction."""
    if not isinstance(a, torch.ScriptObject):
        return a
    c10d = torch._C._distributed_c10d
    if a._has_method("op"):
        return c10d.ReduceOp.RedOpType(a._get_method("op")()).name.lower()
    return c10d.ProcessGroup.unbox(a)


def within_function(op: Any, trace: Trace, *args: Any) -> Any:
    """Record a functional collective with its derivative: on PyTorch 2.11 an op of
    ``_c10d_functional_autograd`` calls it with gradients off."""
    callers = [sys._getframe(k).f_locals.get("self") for k in range(2, 8)]
    if torch.is_grad_enabled() or not any(
        str(c).startswith("_c10d_functional_autograd.") for c in callers
    ):
        return NotImplemented
    with trace, torch.enable_grad():
        return op(*args)
