"""Shape rules of joining and looking up: cat, gather, indexing, scatters, sorting."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .algebra import like, same_dtype
from .rules import axis, broadcast_shape, new, ordinary, shape_rule, sure, sure_in_order
from .sig import Sig, contiguous_stride

aten = torch.ops.aten


def contiguous_joined(parts):
    """Decline unless a join of these (shape, stride)s is surely contiguous."""
    shape, _ = parts[0]
    sure(
        len(shape) not in (4, 5)
        or any(stride[-1] < stride[1] * shape[1] for shape, stride in parts)
    )


@shape_rule(aten.cat)
def _cat(tensors, dim=0):
    sure(tensors)
    same_dtype(*tensors)
    first = tensors[0]
    d = axis(dim, first.ndim)
    sure(
        first.ndim
        and all(
            t.shape[:d] + t.shape[d + 1 :] == first.shape[:d] + first.shape[d + 1 :]
            for t in tensors
        )
    )
    sure(
        all(t.ndim == first.ndim for t in tensors)
        and not (first.ndim == 1 and any(t.shape == (0,) for t in tensors))
    )
    contiguous_joined([(t.shape, t.stride) for t in tensors])
    return new(first, (*first.shape[:d], sum(t.shape[d] for t in tensors), *first.shape[d + 1 :]))


@shape_rule(aten.stack)
def _stack(tensors, dim=0):
    sure(tensors)
    same_dtype(*tensors)
    shape = tensors[0].shape
    d = axis(dim, len(shape) + 1)
    sure(all(t.shape == shape for t in tensors))
    if d < len(shape):  # the kernel joins along this dimension and views it as two
        contiguous_joined([(shape, t.stride) for t in tensors])
    else:
        contiguous_joined([((*shape, 1), (*t.stride, 1)) for t in tensors])
    return new(tensors[0], (*shape[:d], len(tensors), *shape[d:]))


@shape_rule(aten.gather)
def _gather(x, dim, index, *, sparse_grad=False):
    d = axis(dim, x.ndim)
    sure(index.dtype is torch.int64 and index.ndim == x.ndim > 0 and not sparse_grad)
    sure(all(i == d or n <= m for i, (n, m) in enumerate(zip(index.shape, x.shape, strict=True))))
    return new(x, index.shape)


@shape_rule(aten.index_select)
def _index_select(x, dim, index):
    d = axis(dim, x.ndim)
    sure(x.ndim and index.ndim == 1 and index.dtype in (torch.int32, torch.int64))
    return new(x, (*x.shape[:d], index.shape[0], *x.shape[d + 1 :]))


@shape_rule(aten.embedding)
def _embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    sure(weight.ndim == 2 and indices.dtype in (torch.int32, torch.int64))
    sure_in_order(weight)
    return new(weight, (*indices.shape, weight.shape[1]))


@shape_rule(aten.embedding_dense_backward)
def _embedding_backward(g, indices, num_weights, padding_idx, scale_grad_by_freq):
    sure(
        indices.dtype in (torch.int32, torch.int64)
        and g.ndim == indices.ndim + 1
        and g.shape[:-1] == indices.shape
    )
    return new(g, (num_weights, g.shape[-1]))


@shape_rule(aten.index.Tensor)
def _index(x, indices):
    sure(indices and len(indices) <= x.ndim and 0 not in x.shape)
    given = [i for i, t in enumerate(indices) if t is not None]
    sure(given and all(indices[i].dtype in (torch.int32, torch.int64) for i in given))
    sure(given[-1] - given[0] == len(given) - 1)
    sure(ordinary(x))
    found = broadcast_shape(*[indices[i].shape for i in given])
    before, after = x.shape[: given[0]], x.shape[given[-1] + 1 :]
    return new(x, (*before, *found, *after))


@shape_rule(aten.slice_backward)
def _slice_backward(g, sizes, dim, start, end, step):
    axis(dim, len(sizes))
    sure(step > 0)
    return new(g, sizes)


@shape_rule(aten.select_backward)
def _select_backward(g, sizes, dim, index):
    n = sizes[axis(dim, len(sizes))]
    sure(-n <= index < n)
    return new(g, sizes)


@shape_rule(aten.scatter.src, aten.scatter_add, aten.scatter.value)
def _scatter(x, dim, index, source):
    d = axis(dim, x.ndim)
    sure(index.dtype is torch.int64 and index.ndim == x.ndim > 0)
    sure(all(i == d or n <= m for i, (n, m) in enumerate(zip(index.shape, x.shape, strict=True))))
    if source.__class__ is Sig:
        sure(source.dtype is x.dtype and source.ndim == x.ndim)
        sure(all(n <= m for n, m in zip(index.shape, source.shape, strict=True)))
    sure_in_order(x)
    return like(x)


@shape_rule(aten.index_put)
def _index_put(x, indices, values, accumulate=False):
    sure(values.dtype is x.dtype and indices)
    if not fitting_masks(x, indices):
        chosen = _index(x, indices).shape
        sure(broadcast_shape(values.shape, chosen) == chosen)
    return like(x)


def fitting_masks(x: Sig, indices: Sequence[Sig | None]) -> bool:
    """Return whether there are masks among the indices. Decline masks of other shapes."""
    masks, d = False, 0
    for i in indices:
        if i is not None and i.dtype is torch.bool:
            sure(i.shape == x.shape[d : d + i.ndim])
            masks, d = True, d + i.ndim
        else:
            d += 1
    sure(d <= x.ndim and (not masks or all(i is None or i.dtype is torch.bool for i in indices)))
    return masks


@shape_rule(aten.index_add, aten.index_copy)
def _index_add(x, dim, index, source, *, alpha=1):
    sure(
        source.shape == _index_select(x, dim, index).shape
        and source.dtype is x.dtype
        and index.dtype is torch.int64
    )
    sure(alpha.__class__ is int)
    sure_in_order(x)
    return like(x)


@shape_rule(aten.slice_scatter)
def _slice_scatter(x, source, dim=0, start=None, end=None, step=1):
    d = axis(dim, x.ndim)
    sure(
        x.ndim
        and step > 0
        and x.offset == 0
        and x.stride == contiguous_stride(x.shape)
        and source.dtype is x.dtype
    )
    length = len(range(x.shape[d])[slice(start, end, step)])
    sure(source.shape == (*x.shape[:d], length, *x.shape[d + 1 :]))
    sure_in_order(x)
    return like(x)


@shape_rule(aten.sort, aten.sort.stable)
def _sort(x, dim=-1, descending=False, *, stable=None):
    axis(dim, x.ndim)
    sure(not x.dtype.is_complex)
    sure_in_order(x)
    return like(x), like(x, torch.int64)


@shape_rule(aten.topk)
def _topk(x, k, dim=-1, largest=True, sorted=True):
    d = axis(dim, x.ndim)
    sure(x.ndim and 0 <= k <= x.shape[d] and x.dtype.is_floating_point)
    shape = (*x.shape[:d], k, *x.shape[d + 1 :])
    return new(x, shape), new(x, shape, torch.int64)


@shape_rule(aten.repeat)
def _repeat(x, repeats):
    lead = len(repeats) - x.ndim
    sure(lead >= 0 and all(r >= 0 for r in repeats))
    return new(x, [n * r for n, r in zip((1,) * lead + tuple(x.shape), repeats, strict=True)])


@shape_rule(aten.constant_pad_nd)
def _constant_pad(x, pads, value=0):
    sure(len(pads) % 2 == 0 and len(pads) <= 2 * x.ndim and all(p >= 0 for p in pads))
    sure(x.stride == contiguous_stride(x.shape))
    return new(
        x,
        [
            n + sum(pads[2 * d : 2 * d + 2])
            for d, n in zip(range(x.ndim - 1, -1, -1), x.shape, strict=True)
        ],
    )
