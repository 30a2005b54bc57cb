"""An index that no sample may have is refused under vmap, as a loop over the samples refuses it:
where samples share one table, it would be an element of another sample."""

import pytest
import torch
import torch.nn.functional as F

from aotfunc import grad, jit, vmap
from tests.reference import assert_same

ROW = torch.tensor([1.0, -2.0, 3.0, 0.5])
TABLE = torch.arange(12.0).reshape(4, 3).sin()
GOOD, BAD = [0, 1], [0, 4]
BAG = torch.tensor([0, 1])


def written(x, i):
    y = x.clone()
    y[i] = 9.0
    return y


#: ``name: (f(x, i), x, indices of one sample that are right, and others that are not)``
INDICES = {
    "embedding": (lambda x, i: F.embedding(i, x), TABLE, GOOD, BAD),
    "embedding, negative": (lambda x, i: F.embedding(i, x), TABLE, GOOD, [0, -1]),
    "embedding, padded": (lambda x, i: F.embedding(i, x, padding_idx=1), TABLE, GOOD, BAD),
    "embedding, renormed": (lambda x, i: F.embedding(i, x * 1, max_norm=1.0), TABLE, GOOD, BAD),
    "embedding, scaled": (
        lambda x, i: F.embedding(i, x, scale_grad_by_freq=True),
        *(TABLE, GOOD, BAD),
    ),
    "bag, sum": (lambda x, i: F.embedding_bag(i, x, BAG, mode="sum"), TABLE, GOOD, BAD),
    "bag, mean": (lambda x, i: F.embedding_bag(i, x, BAG), TABLE, GOOD, BAD),
    "bag, max": (lambda x, i: F.embedding_bag(i, x, BAG, mode="max"), TABLE, GOOD, BAD),
    "gather": (lambda x, i: x.gather(0, i), ROW, GOOD, BAD),
    "take": (lambda x, i: x.take(i), ROW, GOOD, BAD),
    "take, negative": (lambda x, i: x.take(i), ROW, [0, -4], [0, -5]),
    "x[i]": (lambda x, i: x[i], ROW, GOOD, BAD),
    "x[i], negative": (lambda x, i: x[i], ROW, [0, -4], [0, -5]),
    "x[i] = y": (written, ROW, GOOD, BAD),
    "x[i[1]]": (lambda x, i: x[i[1]], ROW, GOOD, BAD),
    "index_select": (lambda x, i: x.index_select(0, i), ROW, GOOD, BAD),
    "index_add": (lambda x, i: x.index_add(0, i, x[:2]), ROW, GOOD, BAD),
    "index_copy": (lambda x, i: x.index_copy(0, i, x[:2]), ROW, GOOD, BAD),
    "index_fill": (lambda x, i: x.index_fill(0, i, 1.0), ROW, GOOD, BAD),
    "index_fill, negative": (lambda x, i: x.index_fill(0, i, 1.0), ROW, [0, -4], [0, -5]),
    "index_fill of columns": (
        lambda x, i: x.index_fill(-1, i, x[0, 0]),
        *(TABLE, [1, -3], [1, -4]),
    ),
    "put": (lambda x, i: x.put(i, x[:2], accumulate=True), ROW, GOOD, BAD),
    "scatter": (lambda x, i: x.scatter(0, i, x[:2]), ROW, GOOD, BAD),
    "scatter_add": (lambda x, i: x.scatter_add(0, i, x[:2]), ROW, GOOD, BAD),
    "scatter_reduce": (lambda x, i: x.scatter_reduce(0, i, x[:2], "amax"), ROW, GOOD, BAD),
    "max_unpool": (
        lambda x, i: F.max_unpool1d(x[None, None, :2], i[None, None], 2),
        ROW,
        GOOD,
        BAD,
    ),
    "repeat_interleave": (
        lambda x, i: torch.repeat_interleave(x[:2], i, output_size=4),
        *(ROW, [1, 3], [1, 4]),
    ),
    "repeat_interleave, negative": (
        lambda x, i: torch.repeat_interleave(x[:2], i, output_size=4),
        *(ROW, [1, 3], [5, -1]),
    ),
    "nll_loss": (lambda x, i: F.nll_loss(torch.outer(x[:2], x), i), ROW, GOOD, BAD),
    "nll_loss of one": (lambda x, i: F.nll_loss(x, i[1], reduction="sum"), ROW, GOOD, BAD),
    "nll_loss of images": (
        lambda x, i: F.nll_loss(torch.outer(x[:2], x)[..., None, None], i[:, None, None]),
        *(ROW, GOOD, BAD),
    ),
    "multi_margin_loss": (
        lambda x, i: F.multi_margin_loss(torch.outer(x[:2], x), i),
        ROW,
        GOOD,
        BAD,
    ),
    "multilabel_margin_loss": (lambda x, i: F.multilabel_margin_loss(x[:2], i), ROW, GOOD, [0, 2]),
    "segment_reduce": (
        lambda x, i: torch.segment_reduce(x, "sum", lengths=i),
        *(ROW, [1, 3], [1, 4]),
    ),
}
AROUND = {
    "vmap": lambda f: vmap(f),
    "vmap of grad": lambda f: vmap(grad(lambda x, i: f(x, i).square().sum())),
    "vmap of indices": lambda f: lambda x, i: vmap(f, (None, 0))(x[0], i),
    "jit": lambda f: jit(vmap(f)),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_of_one_sample(name):
    f, x, good, bad = INDICES[name]
    with pytest.raises((RuntimeError, IndexError)):
        f(x, torch.tensor(bad))
    xs = torch.stack([x, x + 1])
    right = torch.tensor([good, good])
    want = torch.stack([f(x, i) for x, i in zip(xs, right, strict=True)])
    assert_same(vmap(f)(xs, right), want, rtol=1e-6, atol=1e-6)
    for around in AROUND.values():
        for wrong in ([bad, good], [good, bad]):
            with pytest.raises((RuntimeError, IndexError)):
                around(f)(xs, torch.tensor(wrong))


#: reductions of losses whose kernel for the gradient writes wherever a class says
LOSSES = {
    "a mean": lambda x, i: F.cross_entropy(x, i),
    "a sum": lambda x, i: F.cross_entropy(x, i, reduction="sum"),
    "each": lambda x, i: F.cross_entropy(x, i, reduction="none").sum(),
    "smoothed": lambda x, i: F.cross_entropy(x, i, label_smoothing=0.1),
    "weighted": lambda x, i: F.cross_entropy(x, i, weight=ROW.abs()),
}
CLASSES = {"beyond": 10**9, "next": 4, "negative": -1}


@pytest.mark.parametrize("of", [(), (3,), (3, 2, 2)], ids=["one", "several", "images"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_class_that_is_none(name, of):
    """Nothing else reads the loss, which the forward looks at classes for."""
    of_one = grad(LOSSES[name])
    x, i = torch.randn(2, *of[:1], 4, *of[1:]), torch.randint(4, (2, *of))
    want = torch.stack([of_one(x, i) for x, i in zip(x, i, strict=True)])
    assert_same(vmap(of_one)(x, i), want, rtol=1e-5, atol=1e-6)
    for bad in CLASSES.values():
        wrong = i.clone()
        wrong.view(-1)[-1] = bad
        for call in (vmap(of_one), jit(vmap(of_one))):
            with pytest.raises((RuntimeError, IndexError)):
                call(x, wrong)
        with pytest.raises((RuntimeError, IndexError)):
            vmap(vmap(of_one))(x[None], wrong[None])
