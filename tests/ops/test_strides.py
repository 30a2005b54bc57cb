"""What ops return for arguments that lie anyhow in memory: the signature that a run has, and the
values of dense ones.

The calls are those that the transforms of ops of the database make. AOTFUNC_FUZZ=N takes N ops
instead of 12."""

import functools
import random

import pytest
import torch
from torch.utils._pytree import tree_leaves

import aotfunc
from aotfunc.trace.kernels import READ_AS_LAID, misread
from aotfunc.trace.shapes import infer
from aotfunc.trace.shapes.sig import Facts, Sig, fill, sig_of
from tests.laid import laid
from tests.ops import table
from tests.sweeps import FIRST, seeds

COUNT = len(seeds(12))
FEW = [
    "nn_functional_group_norm",
    "linalg_det",
    "nn_functional_scaled_dot_product_attention",
    "index_put",
]
NAMES = [*FEW, *random.Random(FIRST).sample([*table.OPS], COUNT)][:COUNT]

#: whose values are not those of dense arguments: factors that depend on the layout, which of equal
# values comes first,
#: a kernel that takes offsets to be contiguous (as eager does), and one that reads indices
# anywhere
OTHERWISE = {
    "_linalg_det",
    "_linalg_slogdet",
    "median",
    "nanmedian",
    "mode",
    "kthvalue",
    "sort",
    "topk",
    "_unique2",
}
UNSAFE = {
    "_embedding_bag",
    "_embedding_bag_forward_only",
    "adaptive_max_pool3d_backward",
    "_segment_reduce_backward",
}


@pytest.fixture
def calls(monkeypatch):
    """``calls(name)``: each call that an op's transforms make, with literals and the (shape,
    dtype) of its tensors."""

    def made_by(name):
        aotfunc.clear_caches()
        found, real = {}, infer.infer

        def seen(op, args, kwargs, sigs):
            found[op, repr(args), repr(kwargs), sigs] = op, args, kwargs, sigs
            return real(op, args, kwargs, sigs)

        with monkeypatch.context() as patch:
            patch.setattr(infer, "infer", seen)
            for dtype in {"float64", "complex128"} & set(table.dtypes(table.OPS[name])):
                for composition in {"vjp", "jvp", "vmap"} & set(table.compositions(name, dtype)):
                    table.check(name, dtype, composition)
        return [call for call in found.values() if fit_to_run(*call)]

    return made_by


def fit_to_run(op, args, kwargs, sigs):
    facts, name = Facts(op), infer.plain_name(op)
    unlike = (
        facts.dynamic
        or facts.strided
        or facts.effect
        or facts.view_of is not None
        or "empty" in name
    )
    return (
        sigs
        and not unlike
        and op.namespace == "aten"
        and name not in UNSAFE
        and sum(s.numel for s in sigs) < 5000
    )


def filled(draw, shape, dtype):
    g = torch.Generator().manual_seed(draw.randrange(1 << 30))
    x = torch.rand(shape, dtype=torch.float64, generator=g)
    return (
        (x * 0.8 + 0.1).to(dtype)
        if dtype.is_floating_point or dtype.is_complex
        else (x > 1).to(dtype)
    )


def called(op, args, kwargs, tensors):
    return op(*fill(args, tensors), **{k: fill(v, tensors) for k, v in kwargs.items()})


def described(outs):
    return [
        (tuple(s.shape), s.stride, s.dtype) if 0 not in s.shape else (tuple(s.shape), s.dtype)
        for s in outs
    ]


@pytest.mark.limit(60)
@pytest.mark.parametrize("name", NAMES)
def test_calls_of(name, calls):
    draw, wrong = random.Random(name), []
    for op, args, kwargs, sigs in calls(name):
        for _ in range(4):
            dense = [filled(draw, s.shape, s.dtype) for s in sigs]
            given = [
                laid(draw, x, expanded=not Facts(op).writes and draw.random() < 0.2) for x in dense
            ]
            dense = [x.clone(memory_format=torch.contiguous_format) for x in given]
            run = functools.partial(called, op, args, kwargs)
            known = tuple(map(sig_of, given))
            if misread(op, fill(args, known)):
                continue
            try:
                want = [x for x in tree_leaves(run(dense)) if isinstance(x, torch.Tensor)]
                got = [x for x in tree_leaves(run(given)) if isinstance(x, torch.Tensor)]
            except (RuntimeError, IndexError):
                continue  # zeros are no indices, or a view is not to be had
            said = [
                s for s in tree_leaves(infer.infer(op, args, kwargs, known)) if isinstance(s, Sig)
            ]
            if described(said) != described(map(sig_of, got)):
                wrong.append(f"{op}{args}{kwargs} of {described(known)}: said {described(said)}")
            elif (
                not Facts(op).random
                and "dropout" not in op.name()
                and infer.plain_name(op) not in OTHERWISE
            ):
                for g, w in zip(got, want):
                    if not torch.allclose(g, w, rtol=1e-6, atol=1e-8, equal_nan=True):
                        wrong.append(
                            f"{op}{args}{kwargs} of {described(known)} computes something else"
                        )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", READ_AS_LAID, ids=str)
def test_dense_arguments_are_never_copied(op):
    for shape in ((2, 3, 4, 5), (2, 3, 0)):
        sigs = [sig_of(torch.zeros(shape, device="meta")) for _ in op._schema.arguments]
        assert not misread(op, sigs)
