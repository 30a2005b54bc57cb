"""Tell how arguments are a batch: the dimension of each leaf, and the number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_

from ..cache import Cache
from ..capture.instances import opened_in
from ..capture.tree import Arguments, in_order_of, structure
from ..errors import ArgumentError
from ..trace.kinds import check_kind
from ..trace.shapes.sig import Sig, make_sig
from ..trace.tape import signature

Dims = int | None | tuple | list | dict
_DIMS = frozenset({int, type(None)})


def input_dims(in_dims: Dims, args: tuple, arguments: Arguments) -> list[int | None]:
    """Return one non-negative dim per leaf."""
    if not isinstance(in_dims, (int, tuple)) or isinstance(in_dims, bool):
        if in_dims is None:
            raise ArgumentError("vmap: in_dims is None: no argument is batched")
        raise ArgumentError(
            f"vmap: in_dims must be an int or a tuple of dims, not {type(in_dims).__name__}"
        )
    if not args:
        raise ArgumentError(
            "vmap: the function was called without positional arguments: there is nothing to batch"
        )
    if isinstance(in_dims, int):
        flat = [in_dims] * arguments.spans[-1].stop
    elif len(in_dims) == len(args) and all(d is None or isinstance(d, int) for d in in_dims):
        flat = [d for d, span in zip(in_dims, arguments.spans, strict=True) for _ in span]
    else:
        flat = broadcast_prefix(in_dims, tuple(args), "in_dims")
    dims: list[int | None] = []
    for k, (dim, x) in enumerate(zip(flat, arguments.leaves, strict=False)):
        if dim is None or (type(dim) is int and isinstance(x, Tensor) and 0 <= dim < x.dim()):
            dims.append(dim)
            continue
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise ArgumentError(
                f"vmap: in_dims has {dim!r} for {arguments.said(k)}; it must be an int or None"
            )
        if not isinstance(x, Tensor):
            raise ArgumentError(
                f"vmap: in_dims has {dim} for {arguments.said(k)}, which is of type "
                f"{type(x).__name__}, not a tensor; use None there"
            )
        rank = x.dim()
        if not -rank <= dim < rank:
            has = f"which has {rank} dimension{'s' * (rank != 1)}"
            raise ArgumentError(f"vmap: in_dims has {dim} for {arguments.said(k)}, {has}")
        dims.append(dim % rank)
    dims += [None] * (len(arguments.leaves) - len(dims))
    return dims


def broadcast_prefix(prefix: Any, tree: Any, what: str) -> list:
    """Return the leaves of ``prefix``, each repeated for all leaves of ``tree`` below it."""
    flat: list = []
    prefix = in_order_of(tree, prefix)
    try:
        tree_map_(
            lambda x, below: flat.extend([x] * len(tree_leaves(below))),
            opened_in(prefix, always=True),
            opened_in(tree),
        )
    except ValueError:
        raise ArgumentError(
            f"vmap: {what}={prefix!r} does not have the structure of the "
            f"{'arguments' if what == 'in_dims' else 'results'}, {structure(tree)}"
        ) from None
    return flat


def batch_size(arguments: Arguments, dims: Sequence[int | None]) -> int:
    """Return the number of samples. Raises ArgumentError if there is no batch, or sizes differ."""
    sizes = {}
    for k, (x, d) in enumerate(zip(arguments.leaves, dims, strict=True)):
        if d is not None:
            check_kind(x)
            sizes[k] = x.shape[d]
    if not sizes:
        raise ArgumentError("vmap: no argument is batched: in_dims is None for all of them")
    first, *others = sizes.values()
    if any(size != first for size in others):
        said = "; ".join(
            f"{arguments.said(k)} has {size} at dimension {dims[k]}" for k, size in sizes.items()
        )
        raise ArgumentError(f"vmap: the batched arguments have different sizes: {said}")
    return first


class BatchedArguments(NamedTuple):
    """How leaves are a batch: the dimension of each leaf, the number of samples, the signatures of
    the tensors, as they are and at the beginning of their storages, and, by leaf, of one sample,
    and the dimensions of the tensors."""

    dims: Sequence[int | None]
    size: int
    sigs: tuple[Sig, ...]
    starts: tuple[Sig, ...]
    samples: dict[int, Sig]
    tensor_dims: tuple[int | None, ...]


#: (in_dims, signatures of arguments that are tensors) -> the batch
_batches = Cache(1 << 12)


def read_batch(in_dims: Dims, args: tuple, arguments: Arguments) -> BatchedArguments:
    """Return how the arguments are a batch. Raises ArgumentError if they are none."""
    key: Any = None
    # True is equal to 1, but no dimension
    kind = type(in_dims)
    plain = kind is int or (kind is tuple and _DIMS.issuperset(map(type, in_dims)))  # type: ignore
    if arguments.flat and plain:
        try:
            key = in_dims, tuple(map(signature, args))
        except RuntimeError:  # of a kind that is refused below
            pass
        else:
            if (found := _batches[key]) is not None:
                return found
    dims = input_dims(in_dims, args, arguments)
    made = batched_along(arguments, dims, batch_size(arguments, dims))
    if key is not None:
        _batches.put(key, made)
    return made


def batched_along(arguments: Arguments, dims: Sequence[int | None], size: int) -> BatchedArguments:
    """Return the leaves as a batch of so many samples along these dimensions."""
    sigs, samples, tensor_dims = [], {}, []
    for k, (x, d) in enumerate(zip(arguments.leaves, dims, strict=True)):
        if isinstance(x, Tensor):
            check_kind(x)
            sigs.append(signature(x))
            tensor_dims.append(d)
            if d is not None:
                samples[k] = sample_sig(sigs[-1], d)
    starts = tuple([s.start for s in sigs])
    return BatchedArguments(dims, size, tuple(sigs), starts, samples, tuple(tensor_dims))


def sample_sig(sig: Sig, dim: int) -> Sig:
    """Return the signature of one sample of a batch: the first one, if it counts in memory."""
    shape, stride = list(sig.shape), list(sig.stride)
    del shape[dim], stride[dim]
    return make_sig(tuple(shape), tuple(stride), sig.dtype, sig.device, sig.offset)
