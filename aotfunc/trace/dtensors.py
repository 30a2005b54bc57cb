"""Record functions of DTensors as functions of whole tensors.

Inside a captured function a DTensor stands for a traced value of the whole shape. Its placements
are those that PyTorch gives it: each op also runs on DTensors whose parts have no values. Where a
function moves parts between processes, or looks at its own, an op of the graph says so
(:mod:`~aotfunc.transforms.rules.layouts`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..cache import remembered
from ..debug import at, user_line
from ..errors import CaptureError
from ..graph import drawing
from .kinds import is_dtensor
from .placement_rules import DRAWN, PLACEMENT_RULES, drawn_in_parts, rule_for
from .placing import mirrored, without_values
from .traced import Traced, current, no_recording

#: name -> the mesh made last under it: one for each arrangement of processes, however often made
_meshes: dict[str, Any] = {}
#: text -> placements
_placements: dict[str, tuple] = {}


def layout(mesh: Any, placements: Sequence[Any], summed: bool = False) -> str:
    """Return the name of a layout; ``summed``, of one in which nothing is to be added up."""
    from torch.distributed.tensor import Replicate

    placements = tuple([Replicate() if summed and p.is_partial() else p for p in placements])
    name, text = mesh_name(mesh), ";".join(map(str, placements))
    _meshes[name], _placements[text] = mesh, placements
    return f"{name};{text}"


@remembered(8)
def mesh_name(mesh: Any) -> str:
    with no_recording(), _disable_current_modes():
        return f"{mesh.device_type} {mesh.mesh.tolist()} {mesh.mesh_dim_names}"


def mesh_and_placements(layout: str) -> tuple[Any, tuple]:
    name, _, text = layout.partition(";")
    return _meshes[name], _placements[text]


def of_spec(spec: Any, summed: bool = False) -> str:
    return layout(spec.mesh, spec.placements, summed)


# ----- standing for whole tensors ----------------------------------------------------------------


@functools.cache
def standing() -> type:
    """Return the class of DTensors inside captured functions."""
    from torch.distributed.tensor import DTensor

    class TracedDTensor(DTensor):
        traced: Traced
        requires_grad = property(lambda self: self.traced.requires_grad)
        is_leaf = property(lambda self: self.traced.is_leaf)
        grad_fn = property(lambda self: self.traced.grad_fn)

        def to_local(self, *, grad_placements: Any = None) -> Tensor:
            return to_local(current(), None, self, grad_placements)  # in no_grad(), too

        def refuse(self, *_: Any, **__: Any) -> Any:
            raise unsupported("a hook or a gradient")

        register_hook = register_post_accumulate_grad_hook = retain_grad = backward = refuse
        detach_ = requires_grad_ = refuse

    return TracedDTensor


def unsupported(what: str) -> CaptureError:
    return CaptureError(
        f"{what} of a DTensor inside a captured function is not supported{at(user_line())}: take "
        "it outside, or of x.to_local()"
    )


def stand_in(t: Traced, like: Any) -> Tensor:
    """Return a DTensor inside a captured function for ``t``, placed as ``like``."""
    with _disable_current_modes():  # making one detaches the part
        found = standing()(without_values(like), like._spec, requires_grad=False)
    found.traced = t
    return found


def undistributed(x: Any) -> Any:
    """Return the traced value for which a DTensor stands; anything else is itself."""
    return x.traced if is_dtensor(x) and hasattr(x, "traced") else x


# ----- recording ---------------------------------------------------------------------------------


def record_op(trace: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """Record an op on whole tensors, and return DTensors where it does. Those whose parts are
    traced are left to PyTorch's own code for DTensors."""
    leaves, spec = tree_flatten((args, kwargs))
    found = [x for x in leaves if is_dtensor(x)]
    if any(x._local_tensor.__class__ is Traced for x in found):
        return NotImplemented
    if op_draws(func, args, kwargs):
        return record_draw(trace, func, *args, **kwargs)
    whole = [whole_of(trace, x) if is_dtensor(x) else x for x in leaves]
    given = {id(w): x for w, x in zip(whole, leaves, strict=True) if isinstance(w, Traced)}
    try:
        _, placed = rule_for(func, args, kwargs)
    except DataDependentOutputException:  # it asks for a value
        placed = None
    args, kwargs = tree_unflatten(whole, spec)
    outs, out_spec = tree_flatten(trace.__torch_dispatch__(func, (Traced,), args, kwargs))
    results = []
    for o, like in zip(outs, tree_flatten(placed)[0], strict=True):
        written = given.get(id(o))
        made = stand_in(o, like) if is_dtensor(like) else o
        results.append(made if written is None else written)
    return tree_unflatten(results, out_spec)


def record_draw(trace: Any, op: Any, x: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Record an op that each process draws for its part. The graph says where the parts are: it
    may know the values of ``x``, and so need no DTensor."""
    if not drawn_in_parts(op, x):
        raise CaptureError(
            f"{op} draws random numbers for a DTensor{at(user_line())}, from generators that "
            "PyTorch keeps alike in all processes; inside a captured function draw them for "
            "x.to_local()"
        )
    record = lambda op, *args: trace.__torch_dispatch__(op, (Traced,), args, {})
    place, whole, drawn = of_spec(x._spec), whole_of(trace, x), DRAWN[op]
    placed = record(torch.ops.aotfunc_layout.redistribute.default, whole, place, place)
    # the op without a write has no defaults
    rest = [a.default_value for a in op._schema.arguments[len(args) + 1 :] if not a.kwarg_only]
    outs = trace.__torch_dispatch__(drawn, (Traced,), (placed, *args, *rest), kwargs)
    if drawn is not op:  # it writes
        record(torch.ops.aten.copy_.default, whole, outs)
        return x
    return tree_map(stand_in, outs, mirrored(PLACEMENT_RULES[drawn], x, *args, **kwargs))


def op_draws(op: Any, args: tuple, kwargs: dict) -> bool:
    """Return whether an op draws random numbers, for these arguments."""
    switches = drawing(op)
    given = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in switches or ()]
    return switches is not None and (not given or any(given))


def whole_of(trace: Any, x: Any) -> Traced:
    return x.traced if hasattr(x, "traced") else trace.outside_value(x)


def record_function(trace: Any, function: Any, args: tuple) -> Any:
    """Record a Function between DTensors and their parts; NotImplemented for others."""
    name, x = function.__name__, (*args, None)[0]
    if not function.__module__.startswith("torch.distributed.tensor."):
        if any(map(is_dtensor, args)):
            raise unsupported(f"the Function {name}")
        return NotImplemented
    if name not in RECORDED:
        return NotImplemented
    if is_dtensor(x) and x._local_tensor.__class__ is Traced:
        return NotImplemented
    return RECORDED[name](trace, function, *args)


def redistribute(trace: Any, function: Any, x: Any, *rest: Any) -> Tensor:
    like = mirrored(function.apply, x, *rest)
    if like.dtype != x.dtype:
        raise unsupported("redistribute in another dtype")
    y = torch.ops.aotfunc_layout.redistribute(
        whole_of(trace, x), of_spec(like._spec), of_spec(x._spec, summed=True)
    )
    return stand_in(y, like)


def from_local(
    trace: Any, function: Any, x: Tensor, mesh: Any, placements: tuple, check: bool, *rest: Any
) -> Tensor:
    if check:
        raise unsupported("from_local(run_check=True)")
    like = mirrored(function.apply, x, mesh, placements, check, *rest)
    back = rest[2] if len(rest) > 2 and rest[2] is not None else None
    y = torch.ops.aotfunc_layout.from_local(
        x,
        like.shape,
        like.stride(),
        of_spec(like._spec),
        layout(mesh, back or placements, summed=back is None),
    )
    return stand_in(y, like)


def to_local(trace: Any, function: Any, x: Any, back: Any) -> Tensor:
    part, spec = x._local_tensor, x._spec
    return torch.ops.aotfunc_layout.to_local(
        whole_of(trace, x),
        part.shape,
        part.stride(),
        of_spec(spec),
        layout(spec.mesh, back or spec.placements, summed=back is None),
    )


RECORDED = {
    "Redistribute": redistribute,
    "_FromTorchTensor": from_local,
    "_ToTorchTensor": to_local,
}
