"""An op in place whose arguments overlap does what it does in eager mode, or is refused: with the
same layouts, where the kernel goes as a graph does, and by PyTorch itself."""

import pytest
import torch

from aotfunc import aot_function, grad, jit, vmap
from aotfunc.errors import AotfuncError

REFUSED_BY_EAGER, REFUSED, EQUAL = "refused by eager mode, too", "refused", "equal"
INDEX = torch.tensor([1, 0, 2])


def rows():
    return torch.arange(1.0, 13).view(3, 4)


def columns():
    return torch.arange(1.0, 13).view(4, 3).t()


def read_first(x):
    """What "a product" does if its kernel reads everything before it writes."""
    x[:, :3] = torch.addmm(x[:, :3], x[:, :3], x[:, 1:])


#: name -> (what is done to x, in what layout, outcome). Where the CPU chooses the kernel: equal if
#: eager mode does as this function, else refused.
TABLE = {
    "a row": (lambda x: x.add_(x[0]), rows, REFUSED_BY_EAGER),
    "a row that is not dense": (lambda x: x.add_(x[0]), columns, REFUSED),
    "a number of it": (lambda x: x.mul_(x[0, 0]), rows, REFUSED_BY_EAGER),
    "a number that is filled in": (lambda x: x.fill_(x[2, 1]), rows, EQUAL),
    "itself": (lambda x: x.mul_(x), rows, EQUAL),
    "a view of all": (lambda x: x.view(-1).mul_(x.detach().view(-1)), rows, EQUAL),
    "all of it in another order": (lambda x: x[:3, :3].add_(x[:3, :3].t()), rows, REFUSED),
    "its transpose": (lambda x: x[:3, :3].contiguous().add_(x.t()[:3]), rows, EQUAL),
    "other elements": (lambda x: x[:, ::2].sub_(x[:, 1::2]), rows, EQUAL),
    "a shift to the left": (lambda x: x[:, :-1].copy_(x[:, 1:]), rows, EQUAL),
    "a shift to the right": (lambda x: x[:, 1:].copy_(x[:, :-1]), rows, REFUSED),
    "x[…] = x[…]": (lambda x: x.__setitem__((..., slice(1, None)), x[:, :3]), rows, REFUSED),
    "a shift of all": (lambda x: x.view(-1)[1:].copy_(x.view(-1)[:-1]), rows, REFUSED_BY_EAGER),
    "differences": (lambda x: x[:, 1:].sub_(x[:, :-1]), rows, REFUSED),
    "with a number": (lambda x: x[:, 1:].lerp_(x[:, :-1], 0.7), rows, REFUSED),
    "a cumulative sum": (lambda x: torch.cumsum(x, 0, out=x), rows, EQUAL),
    "out=": (lambda x: torch.add(x[:, 2:], 1, out=x[:, 1:3]), rows, EQUAL),
    "out= the other way": (lambda x: torch.add(x[:, 1:3], 1, out=x[:, 2:]), rows, REFUSED),
    "a product": (lambda x: x[:, :3].addmm_(x[:, :3], x[:, 1:]), rows, read_first),
    "a masked copy": (lambda x: x.masked_scatter_(x > 3, x), rows, REFUSED),
    "by an index": (lambda x: x.index_copy_(0, INDEX, x), rows, REFUSED_BY_EAGER),
    "x[i] = x": (lambda x: x.__setitem__(INDEX, x), rows, REFUSED_BY_EAGER),
    "draws by its numbers": (lambda x: x.div_(12).bernoulli_(x), rows, EQUAL),
    "a list of parts": (lambda x: torch._foreach_mul_([x[0], x[1]], 2.0), rows, EQUAL),
    "a list that holds it twice": (lambda x: torch._foreach_mul_([x, x], [2.0, 3]), rows, EQUAL),
    "lists that share a row": (lambda x: torch._foreach_add_([x[:2], x[1:]], 1), rows, EQUAL),
    "a list beside a part": (
        lambda x: torch._foreach_mul_([x[0, 1], x[1]], x[0, 1]),
        rows,
        EQUAL,
    ),
    "a tensor of scalars": (
        lambda x: torch._foreach_addcmul_([x, x], [x, x], [x, x], torch.tensor([2.0, 3])),
        rows,
        EQUAL,
    ),
    "a list of what overlaps": (
        lambda x: torch._foreach_add_([x, x], [x[0], x]),
        columns,
        REFUSED,
    ),
    "lists of parts": (lambda x: torch._foreach_add_([*x[:2]], [*x[:2]]), rows, EQUAL),
    "lists that cross": (lambda x: torch._foreach_add_([*x[:2]], [x[1], x[0]]), rows, EQUAL),
    "real and imaginary parts": (lambda x: x.view(torch.cfloat).mul_(x[:, ::2]), rows, EQUAL),
    "its bytes": (lambda x: x.view(torch.int32).t().add_(x.t()[0].int()), rows, EQUAL),
}
WAYS = {
    "jit": lambda f, x: jit(lambda x: (f(x), None)[1])(x),
    "aot_function": lambda f, x: aot_function(lambda x: (f(x), x * 1)[1], "eager")(x),
    "closed over": lambda f, x: jit(lambda: (f(x), None)[1])(),
    "nested": lambda f, x: jit(lambda x: (jit(lambda x: (f(x), None)[1])(x), None)[1])(x),
}


def outcome(run, x):
    """What became of ``x``, or the error."""
    torch.manual_seed(0)
    try:
        run(x)
    except RuntimeError as e:
        return e
    return x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TABLE)
def test_overlaps(name, way):
    f, layout, expected = TABLE[name]
    want, x = outcome(f, layout()), layout()
    if callable(expected):
        expected = EQUAL if torch.equal(want, outcome(expected, layout())) else REFUSED
    got = outcome(lambda x: WAYS[way](f, x), x)
    assert isinstance(want, Exception) is (expected == REFUSED_BY_EAGER)
    if expected == EQUAL:
        assert torch.equal(got, want)
    else:
        assert isinstance(got, AotfuncError) and "test_overlaps.py" in str(got)
        assert ("clone() of what" if expected == REFUSED else "single memory") in str(got)
        assert torch.equal(x, layout())


def test_arguments_that_overlap_at_a_later_call():
    f = jit(lambda a, b: (a.add_(b), None)[1])
    x = columns()
    f(x, x[0].clone())
    assert torch.equal(x, columns() + columns()[0])
    for part in (x[0], x.view_as(x)[0].detach()):
        with pytest.raises(AotfuncError, match=r"shape \[3, 4\] and meets its memory"):
            f(x, part)
    f(x, -columns()[0])
    f(x[:, 1:3], x[:, ::3][:, :1])
    want = columns()
    assert torch.equal(x, torch.cat([want[:, :1], want[:, 1:3] + want[:, :1], want[:, 3:]], 1))


def test_derivatives_of_what_is_not_refused():
    def shifted(x):
        y = x * x
        y[:, :-1] = y[:, 1:]
        return (y * torch.arange(4)).sum()

    def apart(x):
        y = x * x
        return (torch.cat([y[:, 1:], y[:, 3:]], 1) * torch.arange(4)).sum()

    x = rows()
    want = torch.autograd.functional.jacobian(apart, x)
    assert torch.equal(grad(shifted)(x), want)
    assert torch.equal(vmap(grad(shifted))(x[None])[0], want)


def test_a_part_of_an_expanded_argument_that_is_written():
    x = torch.arange(4.0).expand(3, 4)
    with pytest.raises(AotfuncError, match="expanded tensor"):
        jit(lambda x: (x[:1].add_(1), None)[1])(x)
    assert torch.equal(x, torch.arange(4.0).expand(3, 4))
