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
from torch.utils._pytree import tree_flatten, tree_unflatten

from .debug import outside_dynamo
from .errors import ArgumentError
from .graph import Program
from .trace.shapes import Sig, make_sig, sig_of
from .trace.tracer import Traced
from .trace.tree import Arguments, flatten, unflatten
from .transforms.capture import Recording, leaf_labels, parameter_names, record
from .transforms.fresh import fresh
from .transforms.jacobian import columns, rows
from .transforms.jvp import jvp as jvp_pass
from .transforms.linearize import halve, linear_program
from .transforms.run import execute
from .transforms.vjp import differentiable
from .transforms.vjp import vjp as vjp_pass
from .transforms.vmap import vmap as vmap_pass

aten = torch.ops.aten

Dims = int | None | tuple | list | dict


# ----- what the transforms share --------------------------------------------------------------------------------------


def positions(name: str, args: Arguments, argnums: int | tuple[int, ...]) -> list[int]:
    """Leaf positions of the differentiated arguments; each must be a floating or complex tensor."""
    count = len(args.spans)
    if not isinstance(argnums, int) and not (isinstance(argnums, tuple) and all(isinstance(i, int) for i in argnums)):
        raise ArgumentError(f"{name}: argnums must be an int or a tuple of ints, not {argnums!r}")
    chosen = (argnums,) if isinstance(argnums, int) else argnums
    if not chosen:
        raise ArgumentError(f"{name}: argnums is empty")
    found = []
    for i in chosen:
        if not -count <= i < count:
            raise ArgumentError(f"{name}: argnums={argnums}, but there are {count} positional arguments")
        for k in args.spans[i]:
            check_leaf(name, args.leaves[k], argument_path(args, i % count, k))
            found.append(k)
    if len({i % count for i in chosen}) != len(chosen):
        raise ArgumentError(f"{name}: argnums={argnums} names an argument twice")
    return found


def argument_path(args: Arguments, i: int, k: int) -> str:
    """Which argument, and which leaf of it, leaf ``k`` is."""
    spec = args.specs[i]
    if spec is None:
        return f"argument {i}"
    leaf = k - args.spans[i].start
    return f"argument {i}, leaf {leaf} ({leaf_labels(spec)[leaf].lstrip('_')})"


def check_leaf(name: str, x: Any, where: str) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name}: {where} is a {type(x).__name__}, and only tensors can be differentiated")
    if not (x.is_floating_point() or x.is_complex()):
        raise ArgumentError(
            f"{name}: {where} has dtype {x.dtype}; only floating and complex tensors can be differentiated "
            "(pass it as another argument, or see argnums)"
        )


def chosen_tree(args: Arguments, argnums: int | tuple[int, ...], values: Sequence[Any]) -> Any:
    """``values`` of the differentiated leaves in the shape of the arguments: one tree, or a tuple of them."""
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    feed = iter(values)
    trees = []
    for i in chosen:
        leaves = [next(feed) for _ in args.spans[i]]
        trees.append(unflatten(leaves, args.specs[i]))
    return trees[0] if isinstance(argnums, int) else tuple(trees)


def tensor_index(args: Arguments) -> dict[int, int]:
    """Leaf position to input number of the recording."""
    return {k: n for n, k in enumerate(k for k, x in enumerate(args.leaves) if isinstance(x, Tensor))}


def tensors_of(args: Arguments) -> list[Tensor]:
    return [x for x in args.leaves if isinstance(x, Tensor)]


def split_aux(name: str, f: Callable) -> Callable:
    """``f`` with its result checked to be a pair ``(output, aux)``."""

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = f(*args, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ArgumentError(
                f"{name}: with has_aux=True the function must return (output, aux), not {type(result).__name__}"
            )
        return result

    return call


def record_call(
    name: str, f: Callable, args: Arguments, differentiated: Sequence[int], has_aux: bool
) -> tuple[Recording, int, Any, Any]:
    """Record ``f``; also how many of its leaves are the output's, and the specs of output and aux."""
    specs: list = []

    def flat(*a: Any, **k: Any) -> Any:
        result = split_aux(name, f)(*a, **k) if has_aux else f(*a, **k)
        leaves, spec = flatten(result[0] if has_aux else result)
        more, aux_spec = tree_flatten(result[1]) if has_aux else ([], None)
        specs.append((len(leaves), spec, aux_spec))
        return [*leaves, *more]

    rec = record(flat, args.leaves, args.rebuilt, differentiated=differentiated, name_of=parameter_names(f, args))
    return rec, *specs[0]


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


def check_scalar(name: str, rec: Recording, n_out: int, spec: Any) -> None:
    out = rec.leaves[0] if rec.leaves else None
    if n_out != 1 or not isinstance(out, Tensor) or spec is not None:
        kind = type(out).__name__ if n_out == 1 and spec is None else "a tree"
        raise ArgumentError(f"{name}: the function must return one scalar tensor, not {kind}")
    if out.dim():
        raise ArgumentError(
            f"{name}: the function must return a tensor with zero dimensions, not one of shape {list(out.shape)}; "
            "sum() it, or use vjp or jacrev"
        )
    if not out.is_floating_point():
        raise ArgumentError(
            f"{name}: the function must return a real floating tensor, not {out.dtype}; use vjp or jacrev"
        )


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
    arguments, flat_tangents = _primals_and_tangents("jvp", primals, tangents)
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


def _primals_and_tangents(name: str, primals: Any, tangents: Any) -> tuple[Arguments, list[Tensor]]:
    if not isinstance(primals, tuple) or not primals:
        raise ArgumentError(f"{name}: primals must be a non-empty tuple, not {type(primals).__name__}")
    if not isinstance(tangents, tuple) or len(tangents) != len(primals):
        raise ArgumentError(f"{name}: tangents must be a tuple like primals")
    arguments, others = Arguments(primals, {}), Arguments(tangents, {})
    positions(name, arguments, tuple(range(len(primals))))
    if arguments.specs != others.specs:
        raise ArgumentError(f"{name}: tangents do not have the structure of primals")
    flat = []
    for i, (p, t) in enumerate(zip(arguments.leaves, others.leaves, strict=True)):
        if not isinstance(t, Tensor) or t.shape != p.shape:
            shape = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ArgumentError(f"{name}: tangent leaf {i} must have its primal's shape {list(p.shape)}, not {shape}")
        if t.dtype != p.dtype and name == "jvp_fn":
            raise ArgumentError(f"{name}: tangent leaf {i} must have its primal's dtype {p.dtype}, not {t.dtype}")
        flat.append(like(t, p))
    return arguments, flat


def like(t: Tensor, p: Tensor) -> Tensor:
    """``t`` with the dtype and the memory layout that a tangent of ``p`` is expected in."""
    if t.dtype != p.dtype:
        t = t.to(p.dtype)
    if t.stride() != p.stride() or t.storage_offset() != p.storage_offset():
        out = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device) if dense_layout(p) else None
        t = t.contiguous() if out is None else out.copy_(t)
    return t


def dense_layout(p: Tensor) -> bool:
    return p.storage_offset() == 0 and all(s for s, n in zip(p.stride(), p.shape, strict=True) if n > 1)


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
        _, flat = _primals_and_tangents("jvp_fn", primals, tangents)
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
    sample. ``chunk_size``: samples at a time. ``strict`` refuses ops that can only be batched by a loop over the
    samples. Raises ArgumentError if dims and arguments do not fit, or sizes differ.

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


def input_dims(in_dims: Dims, args: tuple, arguments: Arguments) -> list[int | None]:
    """One dim per leaf, non-negative."""
    if not isinstance(in_dims, int | tuple) or isinstance(in_dims, bool):
        if in_dims is None:
            raise ArgumentError("vmap: in_dims is None: no argument is batched")
        raise ArgumentError(f"vmap: in_dims must be an int or a tuple of dims, not {type(in_dims).__name__}")
    if not args:
        raise ArgumentError("vmap: the function was called without positional arguments: there is nothing to batch")
    flat = broadcast_prefix(in_dims, tuple(args), "in_dims")
    dims: list[int | None] = []
    for k, (dim, x) in enumerate(zip(flat, arguments.leaves, strict=False)):
        if dim is None:
            dims.append(None)
            continue
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise ArgumentError(f"vmap: in_dims has {dim!r} for leaf {k}; it must be an int or None")
        if not isinstance(x, Tensor):
            raise ArgumentError(
                f"vmap: in_dims has {dim} for leaf {k}, which is a {type(x).__name__}, not a tensor; use None there"
            )
        if not -x.dim() <= dim < x.dim():
            raise ArgumentError(f"vmap: in_dims has {dim} for leaf {k}, which has only {x.dim()} dimensions")
        dims.append(dim % x.dim())
    dims += [None] * (len(arguments.leaves) - len(dims))
    return dims


def broadcast_prefix(prefix: Any, tree: Any, what: str) -> list:
    """The leaves of ``prefix`` repeated for the leaves of ``tree`` below them."""
    from torch.utils._pytree import _broadcast_to_and_flatten

    _, spec = tree_flatten(tree)
    flat = _broadcast_to_and_flatten(prefix, spec)
    if flat is None:
        raise ArgumentError(
            f"vmap: {what}={prefix!r} does not have the structure of the "
            f"{'arguments' if what == 'in_dims' else 'results'}"
        )
    return flat


def batch_size(arguments: Arguments, dims: Sequence[int | None]) -> int:
    sizes = {x.shape[d] for x, d in zip(arguments.leaves, dims, strict=True) if d is not None}
    if not sizes:
        raise ArgumentError("vmap: no argument is batched: in_dims is None for all of them")
    if len(sizes) > 1:
        raise ArgumentError(f"vmap: the batched arguments have different sizes: {sorted(sizes)}")
    return sizes.pop()


def _batched(
    func: Callable,
    arguments: Arguments,
    dims: Sequence[int | None],
    size: int,
    out_dims: Dims,
    randomness: str,
    strict: bool,
) -> Any:
    samples = {
        k: sample_sig(x, d) for k, (x, d) in enumerate(zip(arguments.leaves, dims, strict=True)) if d is not None
    }
    rec = record(
        func,
        arguments.leaves,
        arguments.rebuilt,
        samples=samples,
        why_not="there is one for each sample of the batch",
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
    tensor_dims = tuple(d for x, d in zip(arguments.leaves, dims, strict=True) if isinstance(x, Tensor))
    sigs = tuple(x.sig if x.__class__ is Traced else sig_of(x) for x in tensors)
    own = rec.aliases
    key = ("vmap", tensor_dims, sigs, size, randomness, results_dims, strict, own)
    program = derived(
        base, key, lambda: fresh(vmap_pass(base, tensor_dims, sigs, size, randomness, results_dims, strict), own)
    )
    return rec.results(execute(program, [*tensors, *rec.closed_over]))


def sample_sig(x: Tensor, dim: int) -> Sig:
    """The signature of one sample of a batch."""
    shape, stride = list(x.shape), list(x.stride())
    del shape[dim], stride[dim]
    return make_sig(tuple(shape), tuple(stride), x.dtype, x.device)


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
    parts = []
    for start in range(0, size, chunk):
        count = min(chunk, size - start)
        piece = Arguments((), {})
        piece.specs, piece.spans, piece.kw_spec = arguments.specs, arguments.spans, arguments.kw_spec
        piece.leaves = [
            x if d is None else x.narrow(d, start, count) for x, d in zip(arguments.leaves, dims, strict=True)
        ]
        parts.append(_batched(func, piece, dims, count, out_dims, randomness, strict))
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
