"""The transforms as users call them, with torch.func's signatures: trees in, trees out.

Each call records ``f`` once, looks the transformed program up by the recording's key and runs it; inside another
transform the run is recorded in turn. So transforms nest to any depth, and no result is ever stale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from .arguments import (
    Dims,
    batch_size,
    broadcast_prefix,
    check_scalar,
    chosen_tree,
    input_dims,
    positions,
    primals_and_tangents,
    record_call,
    sample_sig,
    tensor_index,
    tensors_of,
)
from .asked import Samples
from .debug import outside_dynamo
from .errors import ArgumentError
from .graph import Program, draws
from .run import execute
from .trace.shapes import sig_of
from .trace.traced import Traced
from .trace.tree import Arguments, flatten, unflatten
from .transforms.capture import Recording, parameter_names, record
from .transforms.fresh import fresh
from .transforms.jacobian import columns, rows
from .transforms.jvp import jvp as jvp_pass
from .transforms.linearize import halve, linear_program
from .transforms.vjp import differentiable
from .transforms.vjp import vjp as vjp_pass
from .transforms.vmap import vmap as vmap_pass

aten = torch.ops.aten


def derived(program: Program, key: tuple, make: Callable[[], Program]) -> Program:
    """A program made from another, once."""
    made = program.cache.get(key)
    if made is None:
        made = program.cache[key] = make()
    return made


# ----- reverse mode ---------------------------------------------------------------------------------------------------


def grad_and_value(func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """The function ``(*args) -> (gradient, value)`` of a scalar function; ``(gradient, (value, aux))`` with
    ``has_aux``.

    The gradient has the tree of the argument (a tuple of trees for a tuple ``argnums``), each leaf the shape and
    dtype of its primal. Arguments that do not matter get zeros. Raises ArgumentError if a differentiated leaf is not
    a floating or complex tensor, or the output not a real tensor with zero dimensions.

    >>> grad_and_value(lambda x: (x * x).sum())(torch.tensor([1.0, 2.0]))
    (tensor([2., 4.]), tensor(5.))
    """

    @outside_dynamo
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        grads, value, aux = _gradient("grad_and_value", func, argnums, has_aux, args, kwargs, value=True)
        return grads, (value, aux) if has_aux else value

    return wrapper


def grad(func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """The gradient of a scalar function with respect to the arguments ``argnums``; ``(gradient, aux)`` with
    ``has_aux``.

    Shapes and errors as in :func:`grad_and_value`.

    >>> grad(lambda x: torch.sin(x).sum())(torch.zeros(2))
    tensor([1., 1.])
    """

    @outside_dynamo
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        grads, _, aux = _gradient("grad", func, argnums, has_aux, args, kwargs, value=False)
        return (grads, aux) if has_aux else grads

    return wrapper


def _gradient(
    name: str, func: Callable, argnums: Any, has_aux: bool, args: tuple, kwargs: dict, value: bool
) -> tuple[Any, Any, Any]:
    arguments = Arguments(args, kwargs)
    chosen = positions(name, arguments, argnums)
    rec, n_out, spec, aux_spec = record_call(name, func, arguments, chosen, has_aux)
    check_scalar(name, rec, n_out, spec)
    base = rec.program()
    index = tensor_index(arguments)
    wrt = tuple(index[k] for k in chosen)

    def make() -> Program:
        have = [i == 0 for i in range(base.n_outputs)]
        keep = range(0 if value else 1, base.n_outputs)
        joint = vjp_pass(base, wrt, have, ones=True, fill=True, keep=keep)
        return fresh(joint, [i - keep.start for i in own])

    own = rec.aliases
    program = derived(base, ("grad", wrt, value, own), make)
    outs = execute(program, [*tensors_of(arguments), *rec.closed_over])
    kept = len(outs) - len(wrt)
    grads = chosen_tree(arguments, argnums, outs[kept:])
    head = 1 if value else 0
    aux = None
    if has_aux:
        leaves = list(rec.leaves[1:])
        for i, t in zip(rec.tensors[1:], outs[head:kept], strict=True):
            leaves[i - 1] = t
        aux = tree_unflatten(leaves, aux_spec)
    return grads, outs[0] if value else None, aux


@outside_dynamo
def vjp(func: Callable, *primals: Any, has_aux: bool = False) -> tuple:
    """``(output, vjp_fn)``, or ``(output, vjp_fn, aux)``: ``vjp_fn(cotangents)`` maps cotangents of the output to a
    tuple of cotangents of the primals.

    ``vjp_fn`` takes one tree like the output, or its parts as separate arguments; it may be called often, and under
    ``vmap``. Raises ArgumentError for non-floating primals, or cotangents that do not fit the output.

    >>> out, vjp_fn = vjp(torch.sin, torch.zeros(2))
    >>> vjp_fn(torch.ones(2))
    (tensor([1., 1.]),)
    """
    arguments = Arguments(primals, {})
    if not primals:
        raise ArgumentError("vjp: there is nothing to differentiate: no primals were given")
    chosen = positions("vjp", arguments, tuple(range(len(primals))))
    rec, n_out, spec, aux_spec = record_call("vjp", func, arguments, chosen, has_aux)
    base = rec.program()
    for k in range(n_out):
        if not isinstance(rec.leaves[k], Tensor):
            raise ArgumentError(
                f"vjp: output leaf {k} is a {type(rec.leaves[k]).__name__}; outputs must be tensors (see has_aux)"
            )
    have = tuple(i < n_out and differentiable(v) for i, v in enumerate(base.vals))
    wrt = tuple(range(len(chosen)))

    def make() -> Program:
        return vjp_pass(base, wrt, have, fill=True)

    joint = derived(base, ("vjp", wrt, have), make)
    halves = joint.cache.get("halves")
    if halves is None:
        early, late, direct = halve(joint, base.n_outputs, sum(have))
        halves = joint.cache["halves"] = (
            fresh(early, [*rec.aliases, *range(base.n_outputs, early.n_outputs)]),
            late,
            direct,
        )
    forward, backward, direct = halves
    inputs = [*tensors_of(arguments), *rec.closed_over]
    outs = execute(forward, inputs)
    residuals = [*outs[base.n_outputs :], *(inputs[i] for i in direct)]
    versions = [t._version for t in residuals]
    results = outs[: base.n_outputs]
    leaves = list(rec.leaves)
    for i, t in zip(rec.tensors, results, strict=True):
        leaves[i] = t
    output = unflatten(leaves[:n_out], spec)
    vals = base.vals[:n_out]

    @outside_dynamo
    def vjp_fn(*cotangents: Any, **_: Any) -> tuple:
        if len(cotangents) == 1 and (spec is None or isinstance(cotangents[0], type(output)) or n_out != 1):
            tree = cotangents[0]
        else:
            tree = tuple(cotangents)
        cts, ct_spec = flatten(tree)
        if len(cts) != n_out or ((spec is None) != (ct_spec is None) and n_out != 1):
            raise ArgumentError(f"vjp_fn: expected cotangents like the output ({n_out} tensors), got {len(cts)}")
        given = []
        for i, (c, v) in enumerate(zip(cts, vals, strict=True)):
            if not isinstance(c, Tensor) or tuple(c.shape) != v.shape:
                shape = list(c.shape) if isinstance(c, Tensor) else type(c).__name__
                raise ArgumentError(f"vjp_fn: cotangent {i} must have the output's shape {list(v.shape)}, not {shape}")
            if have[i]:
                given.append(c.to(v.dtype).contiguous())
        for r, version in zip(residuals, versions, strict=True):
            if r._version != version:
                raise ArgumentError("vjp_fn: an input of vjp was modified in place after the call; clone it before")
        grads = execute(backward, [*residuals, *given])
        return chosen_tree(arguments, tuple(range(len(primals))), grads)

    if has_aux:
        return output, vjp_fn, tree_unflatten(leaves[n_out:], aux_spec)
    return output, vjp_fn


# ----- forward mode ---------------------------------------------------------------------------------------------------


@outside_dynamo
def jvp(func: Callable, primals: Any, tangents: Any, *, strict: bool = False, has_aux: bool = False) -> tuple:
    """``(output, output tangent)``, or ``(output, output tangent, aux)``: the directional derivative along
    ``tangents``.

    ``primals`` and ``tangents`` are tuples of equal trees; the tangent has the output's tree, shapes and dtypes
    (zeros for integer outputs). Raises ArgumentError where they do not fit, for integer primals, and with ``strict``
    if an output does not depend on the primals.

    >>> jvp(torch.sin, (torch.zeros(2),), (torch.ones(2),))
    (tensor([0., 0.]), tensor([1., 1.]))
    """
    arguments, flat_tangents = primals_and_tangents("jvp", primals, tangents)
    rec, n_out, spec, aux_spec = record_call("jvp", func, arguments, range(len(arguments.leaves)), has_aux)
    for k in range(n_out):
        if not isinstance(rec.leaves[k], Tensor):
            raise ArgumentError(
                f"jvp: output leaf {k} is a {type(rec.leaves[k]).__name__}; outputs must be tensors (see has_aux)"
            )
    base = rec.program()
    wrt = tuple(range(len(flat_tangents)))
    if strict:
        bare = derived(base, ("jvp", wrt, False), lambda: jvp_pass(base, wrt, zeros=False))
        if any(t is None for t in bare.outputs[base.n_outputs : base.n_outputs + n_out]):
            raise ArgumentError("jvp(strict=True): an output does not depend on the primals")
    own = rec.aliases
    program = derived(base, ("jvp", wrt, n_out, own), lambda: fresh(linear_program(base, wrt, n_out), own))
    inputs = [*tensors_of(arguments), *flat_tangents, *rec.closed_over]
    outs = execute(program, inputs)
    leaves = list(rec.leaves)
    for i, t in zip(rec.tensors, outs[: base.n_outputs], strict=True):
        leaves[i] = t
    output = unflatten(leaves[:n_out], spec)
    tangent = unflatten(outs[base.n_outputs :], spec)
    if has_aux:
        return output, tangent, tree_unflatten(leaves[n_out:], aux_spec)
    return output, tangent


@outside_dynamo
def linearize(func: Callable, *primals: Any, has_aux: bool = False) -> tuple:
    """``(output, jvp_fn)``: the function's value and its linear map at ``primals``; ``jvp_fn(*tangents)`` does only
    the linear work.

    ``f`` is evaluated once. ``jvp_fn`` may be called often, nested, differentiated and batched.

    >>> out, jvp_fn = linearize(torch.sin, torch.zeros(2))
    >>> jvp_fn(torch.ones(2))
    tensor([1., 1.])
    """
    if not primals:
        raise ArgumentError("linearize: no primals were given")
    arguments = Arguments(primals, {})
    positions("linearize", arguments, tuple(range(len(primals))))
    rec, n_out, spec, aux_spec = record_call("linearize", func, arguments, range(len(arguments.leaves)), has_aux)
    base = rec.program()
    wrt = tuple(range(len(arguments.leaves)))
    program = derived(base, ("linearize", wrt, n_out), lambda: linear_program(base, wrt, n_out))
    halves = program.cache.get("halves")
    if halves is None:
        early, late, direct = halve(program, base.n_outputs, len(wrt))
        halves = program.cache["halves"] = (
            fresh(early, [*rec.aliases, *range(base.n_outputs, early.n_outputs)]),
            late,
            direct,
        )
    early, late, direct = halves
    inputs = [*tensors_of(arguments), *rec.closed_over]
    outs = execute(early, inputs)
    residuals = [*outs[base.n_outputs :], *(inputs[i] for i in direct)]
    leaves = list(rec.leaves)
    for i, t in zip(rec.tensors, outs[: base.n_outputs], strict=True):
        leaves[i] = t
    output = unflatten(leaves[:n_out], spec)

    @outside_dynamo
    def jvp_fn(*tangents: Any) -> Any:
        _, flat = primals_and_tangents("jvp_fn", primals, tangents)
        return unflatten(execute(late, [*residuals, *flat]), spec)

    if has_aux:
        return output, jvp_fn, tree_unflatten(leaves[n_out:], aux_spec)
    return output, jvp_fn


# ----- batching -------------------------------------------------------------------------------------------------------


def vmap(
    func: Callable,
    in_dims: Dims = 0,
    out_dims: Dims = 0,
    randomness: str = "error",
    *,
    chunk_size: int | None = None,
    strict: bool = False,
) -> Callable:
    """``func`` over batches: each tensor argument has a batch dimension where ``in_dims`` says, each result where
    ``out_dims`` says.

    ``in_dims`` and ``out_dims``: an int, ``None`` (not batched) or a tree of these that is a prefix of the arguments'
    (the results') tree. Keyword arguments are not batched. ``randomness``: "error", "same" or "different" draws per
    sample. ``chunk_size``: samples at a time (all of them at once where they share a draw). ``strict`` refuses ops that
    can only be batched by a loop over the samples. Raises ArgumentError if dims and arguments do not fit, or sizes
    differ.

    Where ``func`` asks for a value (``if x.sum() > 0``, ``.item()``, ``x[mask]``, a validation of the arguments), the
    samples are asked, anew at each call: what all of them answer alike holds. Raises CaptureError, with the line, if
    they do not agree: use ``torch.where``, ``x[mask] = v``, ``nonzero_static``.

    >>> vmap(torch.dot)(torch.ones(3, 2), torch.ones(3, 2))
    tensor([2., 2., 2.])
    """
    if randomness not in ("error", "same", "different"):
        raise ArgumentError(f"vmap: randomness must be 'error', 'same' or 'different', not {randomness!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"vmap: chunk_size must be positive, not {chunk_size}")

    @outside_dynamo
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs)
        dims = input_dims(in_dims, args, arguments)
        size = batch_size(arguments, dims)
        if chunk_size is None or size <= chunk_size:
            return _batched(func, arguments, dims, size, out_dims, randomness, strict)
        return _chunked(func, arguments, dims, size, out_dims, randomness, strict, chunk_size)

    return wrapper


def _batched(func: Callable, arguments: Arguments, dims: Sequence[int | None], *how: Any) -> Any:
    rec, program, inputs = _batched_program(func, arguments, dims, *how)
    return rec.results(execute(program, inputs))


def _batched_program(
    func: Callable,
    arguments: Arguments,
    dims: Sequence[int | None],
    size: int,
    out_dims: Dims,
    randomness: str,
    strict: bool,
) -> tuple[Recording, Program, list[Tensor]]:
    """The recording of one sample, the batched program and what to run it on."""
    samples = {
        k: sample_sig(x, d) for k, (x, d) in enumerate(zip(arguments.leaves, dims, strict=True)) if d is not None
    }
    tensor_dims = tuple(d for x, d in zip(arguments.leaves, dims, strict=True) if isinstance(x, Tensor))
    rec = record(
        func,
        arguments.leaves,
        arguments.rebuilt,
        samples=samples,
        batch=Samples(tensor_dims, size, randomness),
        name_of=parameter_names(func, arguments),
    )
    if isinstance(out_dims, list):
        out_dims = tuple(out_dims)
    flat = (
        broadcast_prefix(out_dims, unflatten(rec.leaves, rec.spec), "out_dims")
        if not isinstance(out_dims, int)
        else [out_dims] * len(rec.leaves)
    )
    for k, (x, d) in enumerate(zip(rec.leaves, flat, strict=True)):
        if not isinstance(x, Tensor) and d is not None:
            raise ArgumentError(
                f"vmap: the function must return tensors, but result leaf {k} is {x!r} of type {type(x).__name__}; "
                "out_dims=None lets other values pass"
            )
    results_dims = tuple(flat[k] for k in rec.tensors)
    base = rec.program()
    tensors = tensors_of(arguments)
    sigs = tuple(x.sig if x.__class__ is Traced else sig_of(x) for x in tensors)
    own = rec.aliases
    key = ("vmap", tensor_dims, sigs, size, randomness, results_dims, strict, own)
    program = derived(
        base, key, lambda: fresh(vmap_pass(base, tensor_dims, sigs, size, randomness, results_dims, strict), own)
    )
    return rec, program, [*tensors, *rec.closed_over]


def _chunked(
    func: Callable,
    arguments: Arguments,
    dims: Sequence[int | None],
    size: int,
    out_dims: Dims,
    randomness: str,
    strict: bool,
    chunk: int,
) -> Any:
    parts: list[Any] = []
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        piece = Arguments((), {})
        piece.specs, piece.spans, piece.kw_spec = arguments.specs, arguments.spans, arguments.kw_spec
        piece.leaves = [
            x if d is None else x.narrow(d, start, count) for x, d in zip(arguments.leaves, dims, strict=True)
        ]
        rec, program, inputs = _batched_program(func, piece, dims, count, out_dims, randomness, strict)
        if randomness == "same" and any(map(draws, program.graph.nodes)):  # no two chunks would draw the same
            if parts:
                raise ArgumentError(
                    "vmap: randomness='same' with chunk_size, and not every chunk draws; drop chunk_size"
                )
            return _batched(func, arguments, dims, size, out_dims, randomness, strict)
        parts.append(rec.results(execute(program, inputs)))
    flat = [flatten(p) for p in parts]
    leaves, spec = flat[0]
    where = (
        broadcast_prefix(out_dims, parts[0], "out_dims") if not isinstance(out_dims, int) else [out_dims] * len(leaves)
    )
    joined = [
        torch.cat([p[0][i] for p in flat], d % leaves[i].dim()) if d is not None else leaves[i]
        for i, d in enumerate(where)
    ]
    return unflatten(joined, spec)


def chunk_vmap(
    func: Callable, in_dims: Dims = 0, out_dims: Dims = 0, randomness: str = "error", chunks: int = 2
) -> Callable:
    """:func:`vmap` in ``chunks`` parts, one after another, to use less memory."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs)
        size = batch_size(arguments, input_dims(in_dims, args, arguments))
        return vmap(func, in_dims, out_dims, randomness, chunk_size=max(-(-size // chunks), 1))(*args, **kwargs)

    return functools.wraps(func)(wrapper)


# ----- Jacobians ------------------------------------------------------------------------------------------------------


def jacrev(
    func: Callable, argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable:
    """The Jacobian by reverse mode: for each output of shape ``O`` and argument of shape ``I`` a tensor of shape ``O
    + I``.

    The result has the output's tree, with the tree of the arguments (a tuple for a tuple ``argnums``) in place of
    each leaf. ``chunk_size``: rows at a time. Complex inputs and outputs are refused.

    >>> jacrev(torch.sin)(torch.zeros(2))
    tensor([[1., 0.],
            [0., 1.]])
    """

    @outside_dynamo
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return _jacobian("jacrev", rows, func, argnums, has_aux, chunk_size, args, kwargs)

    return wrapper


def jacfwd(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable:
    """The Jacobian by forward mode; results as in :func:`jacrev`. ``chunk_size``: columns at a time.

    >>> jacfwd(torch.sin)(torch.zeros(2))
    tensor([[1., 0.],
            [0., 1.]])
    """

    @outside_dynamo
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return _jacobian("jacfwd", columns, func, argnums, has_aux, chunk_size, args, kwargs, randomness)

    return wrapper


def hessian(
    func: Callable, argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable:
    """The Hessian, forward over reverse: ``jacfwd(jacrev(func))``; for a scalar function of shape ``I`` a tensor of
    shape ``I + I``.

    >>> hessian(lambda x: (x ** 3).sum())(torch.ones(2))
    tensor([[6., 0.],
            [0., 6.]])
    """
    inner = jacrev(func, argnums, has_aux=has_aux, chunk_size=chunk_size)
    return jacfwd(inner, argnums, has_aux, chunk_size=chunk_size)


def _jacobian(
    name: str,
    assemble: Callable,
    func: Callable,
    argnums: Any,
    has_aux: bool,
    chunk_size: int | None,
    args: tuple,
    kwargs: dict,
    randomness: str = "error",
) -> Any:
    arguments = Arguments(args, kwargs)
    chosen = positions(name, arguments, argnums)
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"{name}: chunk_size must be positive, not {chunk_size}")
    for k in chosen:
        if arguments.leaves[k].is_complex():
            raise ArgumentError(
                f"{name}: leaf {k} is complex; Jacobians are defined for real arguments only (use vjp or jvp)"
            )
    rec, n_out, spec, aux_spec = record_call(name, func, arguments, chosen, has_aux)
    for k in range(n_out):
        x = rec.leaves[k]
        if not isinstance(x, Tensor):
            raise ArgumentError(
                f"{name}: output leaf {k} is a {type(x).__name__}; outputs must be tensors (see has_aux)"
            )
        if x.is_complex():
            raise ArgumentError(
                f"{name}: output leaf {k} is complex; Jacobians are defined for real outputs only (use vjp or jvp)"
            )
        if not x.is_floating_point():
            raise ArgumentError(f"{name}: output leaf {k} has dtype {x.dtype}; outputs must be floating")
    if not n_out:
        raise ArgumentError(f"{name}: the function returned no tensors")
    base = rec.program()
    index = tensor_index(arguments)
    wrt = tuple(index[k] for k in chosen)
    program = derived(
        base, (name, wrt, n_out, chunk_size, randomness), lambda: assemble(base, wrt, n_out, chunk_size, randomness)
    )
    outs = execute(program, [*tensors_of(arguments), *rec.closed_over])
    blocks = [outs[i * len(wrt) : (i + 1) * len(wrt)] for i in range(n_out)]
    result = unflatten([chosen_tree(arguments, argnums, block) for block in blocks], spec)
    if not has_aux:
        return result
    leaves = list(rec.leaves[n_out:])
    for i, t in zip(rec.tensors[n_out:], outs[n_out * len(wrt) :], strict=True):
        leaves[i - n_out] = t
    return result, tree_unflatten(leaves, aux_spec)


# ----- functionalize --------------------------------------------------------------------------------------------------


def functionalize(func: Callable, *, remove: str = "mutations") -> Callable:
    """``func`` without intermediate mutation: the same results, and the same final values of mutated arguments.

    Views are always removed with the mutations (``remove`` is accepted for compatibility: "mutations" or
    "mutations_and_views").
    """
    if remove not in ("mutations", "mutations_and_views"):
        raise ArgumentError(f"functionalize: remove must be 'mutations' or 'mutations_and_views', not {remove!r}")

    @outside_dynamo
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(args, kwargs)
        rec = record(func, arguments.leaves, arguments.rebuilt, name_of=parameter_names(func, arguments))
        base, own = rec.program(), rec.aliases
        program = derived(base, ("functionalize", own), lambda: fresh(base, own))
        return rec.results(execute(program, [*tensors_of(arguments), *rec.closed_over]))

    return wrapper
