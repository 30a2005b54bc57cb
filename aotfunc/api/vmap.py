"""``vmap``: a function written for one sample, run on batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.axes import AXES, axes
from ..capture.capture import as_called, capture, parameter_names
from ..capture.captured import Captured
from ..capture.concretize import batches
from ..capture.followed import Samples
from ..capture.makers import as_makers
from ..capture.tree import Arguments, flatten, leaf_paths, unflatten
from ..debug import where_defined
from ..errors import ArgumentError, CaptureError
from ..graph import Program, draws
from ..runtime.aliasing import Reshapes, change_in_place, ops_in_place, view_program
from ..runtime.called import called
from ..runtime.execute import execute
from ..runtime.resized import resized_program
from ..trace.tape import signature
from ..trace.traced import Traced
from ..transforms.fresh import fresh
from ..transforms.vmap import Axis
from ..transforms.vmap import vmap as vmap_pass
from .batch import (
    BatchedArguments,
    Dims,
    batch_size,
    batched_along,
    broadcast_prefix,
    input_dims,
    read_batch,
)
from .checks import Batches
from .dynamo import read_by_dynamo
from .readings import batched, run_batched
from .validated import validated


@validated(Batches)
@read_by_dynamo(batched, run_batched)
def vmap(
    func: Callable,
    in_dims: Dims = 0,
    out_dims: Dims = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
    strict: bool = False,
    axis_name: str | None = None,
    cond: str = "select",
) -> Callable:
    """Return ``func`` over batches: ``in_dims`` says which dimension of each tensor argument is
    the batch, ``out_dims`` where each result has it.

    ``in_dims`` and ``out_dims``: an int, ``None`` (not batched) or a tree of these that is a
    prefix of the arguments' (the results') tree. Keyword arguments are not batched.
    ``randomness``: "error", "same" or "different" draws per sample. ``chunk_size``: samples at a
    time (all at once if they share a draw). ``axis_name``: the name of the batch for ``psum`` and
    its kind inside of ``func``; it excludes ``chunk_size``. Raises ArgumentError if dims do not
    match the arguments, or sizes differ.

    ``cond``: what to do if samples take different branches of ``cond`` and ``switch``, or
    different numbers of steps of a ``while_loop``. "select" goes each way for the whole batch and
    selects; "map" goes sample by sample, each its own way alone.

    A few ops can only be batched by a loop over the samples: ops whose result's shape depends on
    values, and your own without ``torch.library.register_vmap``. The graph calls them once per
    sample, and a LoopWarning (once for each op) names the op and your line. ``strict`` raises
    RuleError instead.

    If ``func`` asks for a value (``if x.sum() > 0``, ``.item()``, ``x[mask]``, a validation of the
    arguments), all samples answer, anew at each call, and a common answer holds. Raises
    CaptureError, with the line, if they do not agree: use ``torch.where``, ``x[mask] = v``,
    ``nonzero_static``.

    >>> vmap(torch.dot)(torch.ones(3, 2), torch.ones(3, 2))
    tensor([2., 2., 2.])
    >>> x = torch.tensor([[1, 1, 2], [3, 4, 4]])  # results of one shape, by chance
    >>> vmap(torch.unique_consecutive, strict=True)(x)
    Traceback (most recent call last):
    aotfunc.errors.RuleError: vmap(strict=True): aten.unique_consecutive.default can only be ...
    """
    if randomness not in ("error", "same", "different"):
        raise ArgumentError(
            f"vmap: randomness must be 'error', 'same' or 'different', not {randomness!r}"
        )
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ArgumentError(f"vmap: chunk_size must be a positive int, not {chunk_size!r}")

    if cond not in ("select", "map"):
        raise ArgumentError(f"vmap: cond must be 'select' or 'map', not {cond!r}")
    if chunk_size is not None and axis_name is not None:
        raise ArgumentError(
            "vmap: chunk_size and axis_name exclude each other, as a sum over the axis needs all "
            "samples at once"
        )

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs, func)
        batch = read_batch(in_dims, args, arguments)
        axis = _axis(Axis, (batch.size, *how))
        if chunk_size is None or batch.size <= chunk_size:
            return _run(*_batched_program(func, arguments, batch, axis, placed))
        return _chunked(func, arguments, batch, axis, placed, chunk_size)

    placed = tuple(out_dims) if isinstance(out_dims, list) else out_dims
    how = randomness, strict, axis_name, cond == "map"
    return wrapper


_axis = _samples = tuple.__new__  # Axis(...) adds a Python frame


def dims_of_results(out_dims: Dims, leaves: list, spec: Any) -> list[int | None]:
    """Return the batch dimension of each leaf of a result."""
    if isinstance(out_dims, int):
        return [out_dims] * len(leaves)
    results = unflatten(leaves, spec)
    if isinstance(results, Tensor) and isinstance(out_dims, tuple) and len(out_dims) == 1:
        (out_dims,) = out_dims  # torch.func takes it, too
    return broadcast_prefix(out_dims, results, "out_dims")


def _run(
    rec: Captured,
    changes: Reshapes,
    program: Program,
    inputs: list[Tensor],
    dims: Sequence[tuple[int | None, int | None]],
) -> Any:
    """Run a batched program. Returned written inputs and their views stay such. ``dims``: each
    result's batch dimension in the input that it shows, and in itself."""
    if torch.is_grad_enabled():
        outs = called(program, inputs)
    else:
        with rec.gradients():
            outs = called(program, inputs)
    if changes:
        change_in_place(changes, inputs)
    if program.mutated:
        outs = _with_inputs(rec, program, inputs, outs, dims)
    return rec.results(rec.unlike_inputs(outs, inputs))


def _with_inputs(
    rec: Captured,
    program: Program,
    inputs: Sequence[Tensor],
    outs: Sequence[Any],
    dims: Sequence[tuple[int | None, int | None]],
) -> list:
    """Return the results with written inputs, and their views, where the function returned one."""
    found = list(outs)
    for k, (ref, root, (old, new)) in enumerate(zip(rec.refs, rec.roots, dims, strict=True)):
        i = rec.trace.position(root)
        if i not in program.mutated or (old is None) != (new is None):
            continue
        x = inputs[i]
        if ref == root:
            found[k] = x if new is None or new % x.dim() == old else x.movedim(old, new)
        else:
            view = program.once(
                ("view", k), functools.partial(batched_view, rec, ref, x, old, new)
            )
            found[k] = execute(view, [x])[0]
    return found


def batched_view(rec: Captured, ref: int, x: Tensor, old: int | None, new: int | None) -> Program:
    """Return the view of a written input ``x`` that a result shows, for the whole batch."""
    view = view_program(rec, ref)
    size = 1 if old is None else x.shape[old]
    return vmap_pass(view, (old,), (signature(x),), Axis(size), (new,))


def _batched_program(
    func: Callable,
    arguments: Arguments,
    batch: BatchedArguments,
    axis: Axis,
    out_dims: Dims,
) -> tuple[Captured, Reshapes, Program, list[Tensor], list[tuple[int | None, int | None]]]:
    """Return one sample's recording, the ops that reshape its inputs, the batched program, its
    inputs, and the dimensions as _run takes them."""
    tensor_dims = batch.tensor_dims
    record = functools.partial(
        capture,
        as_called(func),
        arguments.leaves,
        arguments.rebuilt,
        samples=batch.samples,
        batch=_samples(Samples, (tensor_dims, axis)),
        numbers=True,
        name_of=parameter_names(func, arguments),
    )
    if axis.name is None:
        rec = record()
    else:
        with axes({**AXES.sizes, axis.name: axis.size}):
            rec = record()
    changes = ops_in_place(rec)
    for i, _ in changes:
        if tensor_dims[i] is not None:
            name = rec.names()[i]
            raise CaptureError(
                f"vmap: the shape of {name}, which is batched, is changed in place; make a view "
                "of it"
            )
    if rec.spec is None and type(out_dims) is int:
        flat: list[int | None] = [out_dims]
    else:
        flat = dims_of_results(out_dims, rec.leaves, rec.spec)
    others = len(rec.tensors) < len(rec.leaves)
    for k, (x, d) in enumerate(zip(rec.leaves, flat, strict=True)) if others else ():
        if not isinstance(x, Tensor) and d is not None:
            path = leaf_paths(rec.spec)[k] if rec.spec is not None else ""
            if x is None and not path:
                raise ArgumentError(
                    f"vmap: {where_defined(func)} returned None: is a `return` missing?"
                )
            raise ArgumentError(
                f"vmap: {where_defined(func)} must return tensors, but the result{path} is {x!r} "
                f"of type {type(x).__name__}; out_dims=None lets other values pass"
            )
    results_dims = tuple([flat[k] for k in rec.tensors] if others else flat)
    base, aliases = rec.program(), rec.aliases  # what makes a program holds no tensors
    how = (tensor_dims, batch.sigs if rec.trace.placed else batch.starts, axis, results_dims)

    def make() -> Program:
        return resized_program(base, *how, aliases, of_this_size)

    def of_this_size() -> Program:
        return as_makers(base, fresh(vmap_pass(base, *how), aliases))

    program = base.derived(("vmap", *how), make)
    places: list[tuple[int | None, int | None]] = []
    if program.mutated:  # without writes no result is an input
        sources = (tensor_dims[r] if 0 <= r < len(tensor_dims) else None for r in rec.roots)
        places += zip(sources, results_dims, strict=True)
    return rec, changes, program, [*rec.trace.origins, *rec.closed_over], places


def _chunked(
    func: Callable,
    arguments: Arguments,
    batch: BatchedArguments,
    axis: Axis,
    out_dims: Dims,
    chunk: int,
) -> Any:
    parts: list[Any] = []
    for start in range(0, axis.size, chunk):
        count = min(chunk, axis.size - start)
        parts_of = zip(arguments.leaves, batch.dims, strict=True)
        piece = arguments.with_leaves(
            [x if d is None else x.narrow(d, start, count) for x, d in parts_of]
        )
        some = axis._replace(size=count)
        part = batched_along(piece, batch.dims, count)
        rec, changes, program, inputs, places = _batched_program(func, piece, part, some, out_dims)
        # several chunks would draw the same numbers
        if axis.randomness == "same" and any(map(draws, program.graph.nodes)):
            if parts:
                raise ArgumentError(
                    "vmap: randomness='same' with chunk_size, and not every chunk draws; drop "
                    "chunk_size"
                )
            return _run(*_batched_program(func, arguments, batch, axis, out_dims))
        parts.append(_run(rec, changes, program, inputs, places))
    flat = [flatten(p) for p in parts]
    leaves, spec = flat[0]
    where = dims_of_results(out_dims, leaves, spec)
    joined = [
        torch.cat([p[0][i] for p in flat], d % leaves[i].dim()) if d is not None else leaves[i]
        for i, d in enumerate(where)
    ]
    return unflatten(joined, spec)


def debug_unwrap(tensor: Tensor, *, recurse: bool = True) -> Tensor:
    """Return the value of a tensor inside a transform, to look at in a debugger: all samples, at
    dimension 0, if it is batched. Any other tensor is returned as it is (``recurse`` is accepted
    for compatibility).

    >>> def f(x):
    ...     print(debug_unwrap(x * 2))
    ...     return x
    >>> _ = vmap(f)(torch.ones(2))
    tensor([2., 2.])
    """
    if tensor.__class__ is not Traced:
        return tensor
    values, count = batches(tensor.tracer, [tensor], "the value of a tensor")
    return values[0] if count > 1 or tensor.tracer.samples is not None else values[0][0]


@validated(Batches)
@read_by_dynamo(batched, run_batched)
def chunk_vmap(
    func: Callable,
    in_dims: Dims = 0,
    out_dims: Dims = 0,
    randomness: str = "error",
    chunks: int = 2,
) -> Callable:
    """Run :func:`vmap` in ``chunks`` parts, one after another, to use less memory. Errors are
    those of :func:`vmap`.

    >>> chunk_vmap(torch.dot, chunks=2)(torch.ones(6, 3), torch.ones(6, 3))
    tensor([3., 3., 3., 3., 3., 3.])
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs, func)
        size = batch_size(arguments, input_dims(in_dims, args, arguments))
        return vmap(func, in_dims, out_dims, randomness, chunk_size=max(-(-size // chunks), 1))(
            *args, **kwargs
        )

    return functools.wraps(func)(wrapper)
