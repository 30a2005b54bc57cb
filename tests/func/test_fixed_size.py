"""``nonzero``, ``masked_select`` and ``unique`` of fixed size, against PyTorch's of any size."""

import pytest
import torch

from aotfunc import grad, hessian, jit, jvp, make_fx, masked_select, nonzero, unique, vmap
from aotfunc.errors import ArgumentError

D = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.tensor(1.0)
XS = torch.randint(-2, 3, (4, 3, 4), generator=G).to(D)  # samples with other counts


def filled(found, size, value):
    """Cut, or fill up, the rows that there are."""
    pad = torch.full((max(size - len(found), 0), *found.shape[1:]), value, dtype=found.dtype)
    return torch.cat([found[:size], pad])


def expected_unique(x, size):
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return filled(values, size, values[0]), inverse, filled(counts, size, 0)


# ours, PyTorch's, by a sample and a size
FUNCTIONS = {
    "nonzero": (
        lambda x, size: nonzero(x, size=size, fill_value=-1),
        lambda x, size: filled(x.nonzero(), size, -1),
    ),
    "columns": (
        lambda x, size: nonzero(x > 0, size=size, as_tuple=True),
        lambda x, size: filled((x > 0).nonzero(), size, 0).unbind(1),
    ),
    "masked_select": (
        lambda x, size: masked_select(x, x[0] > 0, size=size, fill_value=7),
        lambda x, size: filled(torch.masked_select(x, x[0] > 0), size, 7),
    ),
    "unique": (
        lambda x, size: unique(x, size=size, return_inverse=True, return_counts=True),
        expected_unique,
    ),
    "whole numbers": (
        lambda x, size: unique(x.int(), size=size, fill_value=9),
        lambda x, size: filled(x.int().unique(), size, 9),
    ),
}


@pytest.mark.parametrize("size", [0, 2, 20])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name, size):
    ours, theirs = FUNCTIONS[name]
    f = lambda x: ours(x, size)
    samples = [theirs(x, size) for x in XS]
    batch = [torch.stack(c) for c in zip(*samples, strict=True)]
    batch = torch.stack(samples) if isinstance(samples[0], torch.Tensor) else tuple(batch)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0)
    close(f(XS[0]), samples[0])
    close(jit(f, backend="eager")(XS[0]), samples[0])
    close(make_fx(f)(XS[0])(XS[0]), samples[0])
    close(vmap(f, strict=True)(XS), batch)
    close(jit(vmap(f), backend="eager")(XS), batch)


@pytest.mark.parametrize("size", [0, 3, 20])
@pytest.mark.parametrize("name", ["masked_select", "unique"])
def test_derivatives(name, size):
    """Against autograd of what is selected, weighted; of a nest, too."""
    xs = torch.randn(4, 6, dtype=D, generator=G)
    fill = torch.tensor(0.5, dtype=D)
    weights = torch.randn(size, dtype=D, generator=G)
    if name == "unique":
        ours = lambda x, fill: unique(x, size=size, fill_value=fill)
        theirs = lambda x: x.sort()[0]
    else:
        ours = lambda x, fill: masked_select(x, x > 0, size=size, fill_value=fill)
        theirs = lambda x: x[x > 0]
    f = lambda x, fill: (ours(x, fill).sin() * weights).sum()

    def reference(x, fill):
        found = theirs(x)[:size]
        rest = fill.sin() * weights[len(found) :]
        return (found.sin() * weights[: len(found)]).sum() + rest.sum()

    gradients = []
    for x in xs:
        given = x.clone().requires_grad_(), fill.clone().requires_grad_()
        gradients.append(
            torch.autograd.grad(
                reference(*given) + 0 * sum(map(torch.sum, given)), given, create_graph=True
            )
        )
    wanted = tuple(torch.stack(g).detach() for g in zip(*gradients, strict=True))
    close = torch.testing.assert_close
    close(vmap(grad(f, (0, 1)), (0, None))(xs, fill), wanted)
    close(jit(grad(f, (0, 1)), backend="eager")(xs[0], fill), (wanted[0][0], wanted[1][0]))
    tangent = jvp(f, (xs[0], fill), (xs[1], fill))[1]
    close(tangent, wanted[0][0] @ xs[1] + wanted[1][0] * fill)
    second = torch.autograd.functional.hessian(lambda x: reference(x, fill) + 0 * x.sum(), xs[0])
    close(hessian(f)(xs[0], fill), second)


def test_empty():
    none = torch.zeros(0, 3)
    assert torch.equal(masked_select(none, none > 0, size=2), torch.zeros(2))
    assert torch.equal(unique(none, size=2, fill_value=1), torch.ones(2))
    assert nonzero(torch.tensor(2.0), size=2).shape == (2, 0)


def test_errors():
    x = torch.ones(3)
    for size in (-1, True, 2.0, None):
        with pytest.raises(ArgumentError, match=r"nonzero: size must be a number of elements"):
            nonzero(x, size=size)
    with pytest.raises(ArgumentError, match=r"masked_select: mask has dtype torch.float32"):
        masked_select(x, x, size=2)
    with pytest.raises(ArgumentError, match="unique: x is empty"):
        unique(x[:0], size=2)
    with pytest.raises(ArgumentError, match=r"unique: x has dtype torch\.complex64"):
        unique(x + 1j, size=2)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jit(f, backend="eager"), vmap])
@pytest.mark.parametrize(
    "fill, said", [(torch.ones(2), r"has shape \[2\]"), (1j, "is complex"), (X * 1j, "is complex")]
)
def test_fill_values_that_do_not_fit(wrap, fill, said):
    x = torch.ones(2, 3)
    for name, f in {
        "masked_select": lambda x: masked_select(x, x > 0, size=2, fill_value=fill),
        "unique": lambda x: unique(x, size=2, fill_value=fill),
    }.items():
        with pytest.raises(ArgumentError, match=f"{name}: fill_value {said}"):
            wrap(f)(x)
    for index in (fill, 1.5):
        with pytest.raises(ArgumentError, match="nonzero: fill_value must be an int"):
            wrap(lambda x, index=index: nonzero(x, size=2, fill_value=index))(x)
    assert masked_select(x + 1j, x > 0, size=7, fill_value=2j)[-1] == 2j


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jit(f, backend="eager"), vmap])
@pytest.mark.parametrize(
    "dtype, fill, fits",
    [
        (torch.int64, 1.5, False),
        (torch.int64, 2.0, False),
        (torch.int64, X, False),
        (torch.bool, 2, False),
        (torch.bool, 0.5, False),
        (torch.bool, X.int(), False),
        (torch.bool, 1, True),
        (torch.int32, 7, True),
        (torch.int32, True, True),
        (torch.float32, 7, True),
        (torch.float32, X.double(), True),
    ],
)
def test_kinds_of_fill_values(wrap, dtype, fill, fits):
    x = torch.zeros(2, 3, dtype=dtype)
    for name, f in {
        "masked_select": lambda x: masked_select(x, x > 0, size=2, fill_value=fill),
        "unique": lambda x: unique(x, size=2, fill_value=fill),
    }.items():
        if fits:
            assert wrap(f)(x).flatten()[-1] == fill
            continue
        with pytest.raises(ArgumentError, match=f"{name}: fill_value is of .*, and x has dtype"):
            wrap(f)(x)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_the_column_of_a_number(value):
    x = torch.tensor(value)
    f = lambda x: nonzero(x, size=1, as_tuple=True, fill_value=-1)
    (want,) = x.nonzero(as_tuple=True)
    want = filled(want, 1, -1)
    for (found,) in (f(x), jit(f, backend="eager")(x), f(x[None])):
        assert torch.equal(found, want)
    (found,) = vmap(f)(torch.stack([x, x]))
    assert torch.equal(found, torch.stack([want, want]))
