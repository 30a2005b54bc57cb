"""Every third op (with AOTFUNC_FUZZ every op) batched for one size after another: what shares the
code of the first size is bit for bit, and laid out, as what a program of its own computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._pytree import tree_leaves

from aotfunc import clear_caches, vjp, vmap
from aotfunc.api import vmap as batching
from tests.ops.compositions import Call
from tests.ops.table import DTYPES, INTEGERS, OPS, RAGGED, RANDOM, dtypes
from tests.sweeps import every

SMALL = 2000


def rows(x, n):
    """A batch of tensors much like this one."""
    vary = (x.is_floating_point() or x.is_complex()) and x.dtype.itemsize > 1
    return torch.stack([x.detach() * (1 - 0.003 * k) if vary else x for k in range(n)])


def functions(op, sample):
    """The op and its vector-Jacobian product, with their arguments."""
    call = Call.of(op, sample)
    count = len(call.primals)
    pulled = lambda *xs: (lambda out, pull: pull([torch.ones_like(o) for o in out]))(
        *vjp(lambda *p: call.f(*p), *xs)
    )
    yield (
        lambda *xs: call.rebuilt(list(xs[:count]), list(xs[count:])),
        [*call.primals, *call.others],
    )
    if count:
        yield pulled, call.primals


def computed(f, *args):
    try:
        return [x for x in tree_leaves(f(*args)) if isinstance(x, torch.Tensor)]
    except Exception as e:
        return type(e).__mro__[1:]  # an OpError is of a class of its own


@pytest.mark.filterwarnings("ignore::aotfunc.errors.LoopWarning")
@pytest.mark.filterwarnings(
    "ignore:.*(deprecated|in beta|experimental|window was not provided):UserWarning"
)
@pytest.mark.parametrize("name", every(3, sorted(set(OPS) - RAGGED - RANDOM)))
def test_sizes(name, monkeypatch):
    op = OPS[name]
    dtype = {**DTYPES, **INTEGERS}[dtypes(op)[0]] if dtypes(op) else torch.float32
    resized_program = batching.resized_program
    for sample in itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 1):
        for f, args in functions(op, sample):
            if not args or sum(x.numel() for x in args) > SMALL:
                continue
            results = []
            for rule in (resized_program, lambda *how: how[-1]()):
                clear_caches()
                monkeypatch.setattr(batching, "resized_program", rule)
                results.append([computed(vmap(f), *(rows(x, n) for x in args)) for n in (4, 7, 3)])
            for mine, own in zip(*results):
                if isinstance(own, tuple):
                    assert mine == own
                    continue
                for x, y in zip(mine, own, strict=True):
                    near = (
                        0.0 if x.dtype.itemsize == 1 else 1e-12
                    )  # of eight bits only the same are close
                    torch.testing.assert_close(x, y, rtol=near, atol=near, equal_nan=True)
                    assert x.stride() == y.stride()
