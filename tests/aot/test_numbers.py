"""Numbers of outside tensors in what is compiled once: eager's, also after the tensor changed, or
a refusal."""

import copy
import math
import operator
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aotfunc import aot_function, aot_module, grad, grad_and_value, jit, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same, grads

ONE = torch.tensor([1])


def assigned(x, index, value):
    x = x.clone()
    x[index] = value
    return x


def written(x, write):
    x = x.clone()
    write(x)
    return x


def caught(x, c):
    try:
        return x * int(c)
    except RuntimeError:
        return x


def until(x, c):
    n = 0
    while c > n:
        x, n = x + 1, n + 1
    return x


def matched(x, c):
    match c.item():
        case 1:
            return x
        case _:
            return -x


# f(x, c) of a 6x6 float x and a 0-dim integer c, which is 1 at first and then 2
REFUSED = {
    "item": lambda x, c: x * c.item(),
    "float": lambda x, c: x * float(c),
    "int": lambda x, c: x * int(c),
    "complex": lambda x, c: (x * complex(c)).real,
    "bool": lambda x, c: x * bool(c - 1),
    "not": lambda x, c: x * (not c - 1),
    "if": lambda x, c: x if c == 1 else -x,
    "and": lambda x, c: x * 2 if c > 0 and c < 2 else x,
    "while": until,
    "match": matched,
    "in a list": lambda x, c: x if c in [1, 3] else -x,
    "caught": caught,
    "range": lambda x, c: x + sum(1 for _ in range(c)),
    "index": lambda x, c: x * operator.index(c),
    "list * c": lambda x, c: x * len([0] * c),
    "element of a list": lambda x, c: x * [1.0, 2.0, 3.0][c],
    "bytes": lambda x, c: x * len(bytes(c)),
    "sqrt": lambda x, c: x * math.sqrt(c),
    "format": lambda x, c: x * len(f"{c}"),
    "str": lambda x, c: x * (str(c) == str(c)[::-1]),
    "repr": lambda x, c: x * len(repr(c)),
    "tolist": lambda x, c: x * c.tolist(),
    "numpy": lambda x, c: x * float(c.numpy()),
    "asarray": lambda x, c: x * float(np.asarray(c)),
    "from_dlpack": lambda x, c: x * float(np.from_dlpack(c)),
    "array of tensors": lambda x, c: x * float(np.array([c, c])[0]),
    "pickle": lambda x, c: x * pickle.loads(pickle.dumps(c)),
    "storage": lambda x, c: x * c.storage()[0],
    "equal": lambda x, c: x * torch.equal(c, torch.tensor(1)),
    "allclose": lambda x, c: x * torch.allclose(c * 1.0, torch.tensor(1.0)),
    "is_nonzero": lambda x, c: x * torch.is_nonzero(c - 1),
    "Tensor": lambda x, c: x * torch.Tensor([c, c])[0],
    "Size": lambda x, c: torch.zeros(torch.Size([c, 2])) + x.sum(),
    "x[:c]": lambda x, c: x[:c],
    "x[c:]": lambda x, c: x[c:],
    "x[::c]": lambda x, c: x[::c],
    "x[:, :c]": lambda x, c: x[:, :c],
    "x[:c] = 0": lambda x, c: assigned(x, slice(c), 0.0),
    "narrow by": lambda x, c: x.narrow(0, 0, c),
    "arange": lambda x, c: torch.arange(c) + x.sum(),
    "arange to": lambda x, c: torch.arange(0, c, 1) + x.sum(),
    "linspace": lambda x, c: torch.linspace(0, 1, c) + x.sum(),
    "zeros": lambda x, c: torch.zeros(c) + x.sum(),
    "ones": lambda x, c: torch.ones((c, 2)) + x.sum(),
    "eye": lambda x, c: torch.eye(c) + x.sum(),
    "full of size": lambda x, c: torch.full((c,), 2.0) + x.sum(),
    "full": lambda x, c: torch.full((2,), c) + x.sum(),
    "full_like": lambda x, c: torch.full_like(x, c) + x.sum(),
    "new_full": lambda x, c: x.new_full((2,), c) + x.sum(),
    "new_zeros": lambda x, c: x.new_zeros(c) + x.sum(),
    "tril": lambda x, c: x.tril(c),
    "roll": lambda x, c: x.roll(c),
    "rot90": lambda x, c: x.rot90(c),
    "repeat": lambda x, c: x.repeat(c, 1),
    "tile": lambda x, c: x.tile(c),
    "expand": lambda x, c: x[:1].expand(c, 6),
    "view": lambda x, c: x.view(c, -1),
    "reshape": lambda x, c: x.reshape(c, -1),
    "unflatten": lambda x, c: x.flatten().unflatten(0, (c, -1)),
    "as_strided": lambda x, c: x.as_strided((2, 2), (c, 1)),
    "topk": lambda x, c: x.topk(c)[0],
    "kthvalue": lambda x, c: x.kthvalue(c)[0],
    "sum(dim=c)": lambda x, c: x.sum(dim=c - 1),
    "softmax": lambda x, c: x.softmax(c - 1),
    "unsqueeze": lambda x, c: x.unsqueeze(c),
    "transpose": lambda x, c: x[None].transpose(0, c),
    "cat": lambda x, c: torch.cat([x, x], c - 1),
    "chunk": lambda x, c: x.chunk(c)[0],
    "split": lambda x, c: x.split(c)[0],
    "tensor_split": lambda x, c: x.tensor_split(c)[0],
    "unfold": lambda x, c: x.unfold(0, c, 1),
    "sub_(alpha)": lambda x, c: written(x, lambda y: y.sub_(x, alpha=c)),
    "addmm": lambda x, c: torch.addmm(x, x, x, beta=c),
    "threshold": lambda x, c: F.threshold(x, c, 0.0),
    "leaky_relu": lambda x, c: F.leaky_relu(-x, c),
    "elu": lambda x, c: F.elu(-x, c),
    "hardtanh": lambda x, c: F.hardtanh(x, 0, c),
    "norm": lambda x, c: x.norm(c),
    "std": lambda x, c: x.std(correction=c),
    "round": lambda x, c: (x / 7).round(decimals=c),
    "nan_to_num": lambda x, c: (x / 0).nan_to_num(c),
    "pad": lambda x, c: F.pad(x, (c, 0)),
    "pad with": lambda x, c: F.pad(x, (1, 0), value=c),
    "dropout": lambda x, c: F.dropout(x, c - 1),
    "avg_pool": lambda x, c: F.avg_pool1d(x, c),
    "conv": lambda x, c: F.conv1d(x[None], torch.ones(6, 6, 1), stride=c),
    "pixel_shuffle": lambda x, c: F.pixel_shuffle(x.view(4, 3, 3), c),
    "one_hot": lambda x, c: F.one_hot(ONE, c + 1) + x.sum(),
    "layer_norm": lambda x, c: F.layer_norm(x, (6,), eps=c),
    "uniform_": lambda x, c: written(x, lambda y: y.uniform_(0, c)),
    "normal": lambda x, c: torch.normal(0.0, c, (2,)) + x.sum(),
    "randint": lambda x, c: torch.randint(c, (2,)) + x.sum(),
    "manual_seed": lambda x, c: torch.manual_seed(c) and x,
    "nonzero": lambda x, c: c.nonzero() + x.sum(),
    "unique": lambda x, c: c.unique() + x.sum(),
    "mask": lambda x, c: x[:, torch.arange(6) < c],
    "repeat_interleave": lambda x, c: x.repeat_interleave(c, 0),
    "bincount": lambda x, c: torch.bincount(c.reshape(1)) + x.sum(),
    "out=": lambda x, c: torch.full((2,), c, out=torch.empty(2)) + x.sum(),
    "zero_ and item": lambda x, c: x * c.mul(1).add_(1).item(),
}
BY_REFERENCE = {
    "alpha": lambda x, c: x.add(x, alpha=c),
    "addcmul": lambda x, c: x.addcmul(x, x, value=c),
    "addcdiv": lambda x, c: x.addcdiv(x, x + 1, value=c),
    "c * x": lambda x, c: c * x,
    "x ** c": lambda x, c: x**c,
    "x // c": lambda x, c: x * (7 // c),
    "clamp": lambda x, c: x.clamp(min=c),
    "lerp": lambda x, c: x.lerp(x * 2, c * 1.0),
    "where": lambda x, c: torch.where(x > 2, x, c),
    "fill_": lambda x, c: written(x, lambda y: y.fill_(c)),
    "masked_fill": lambda x, c: x.masked_fill(x > 2, c),
    "index_fill": lambda x, c: x.index_fill(0, ONE, c),
    "x[0] = c": lambda x, c: assigned(x, 0, c),
    "x[c]": lambda x, c: x[c],
    "x[-c]": lambda x, c: x[-c] * 2,
    "x[c] = 0": lambda x, c: assigned(x, c, 0.0),
    "select": lambda x, c: x.select(0, c),
    "narrow from": lambda x, c: x.narrow(0, c, 2),
    "outside[c]": lambda x, c: x * torch.arange(6.0)[c],
    "x[c.reshape(1)]": lambda x, c: x[c.reshape(1)],
    "index_select": lambda x, c: x.index_select(0, c),
    "take": lambda x, c: x.take(c),
    "new tensor": lambda x, c: x * c.clone().detach(),
    "isin": lambda x, c: x * torch.isin(x, c),
    "for": lambda x, c: x * sum(c.reshape(1)),
    "stack": lambda x, c: x * torch.stack([c, c])[0],
    "max": lambda x, c: x * torch.maximum(c, ONE),
    "numel": lambda x, c: x * c.numel() * (c.dim() + 1),
    "hash": lambda x, c: x * {c: 2}[c],
    "tensor": lambda x, c: x * torch.tensor([c, 3])[0],
    "tensor of floats": lambda x, c: x * torch.tensor([c, 3.0], dtype=torch.float64)[0],
    "tensor of bools": lambda x, c: x * torch.tensor([c], dtype=torch.bool)[0],
    "as_tensor": lambda x, c: x * torch.as_tensor([c, c])[0],
    "new_tensor": lambda x, c: x * x.new_tensor([c, c])[0],
}
FORMS = {**REFUSED, **BY_REFERENCE}


class Holds(nn.Module):
    """A module that asks its own parameter or buffer."""

    def __init__(self, f, c):
        super().__init__()
        self.f = f
        if isinstance(c, nn.Parameter):
            self.c = c
        else:
            self.register_buffer("c", c)

    def forward(self, x):
        return self.f(x, self.c)


def summed(h):
    return lambda x: h(x).sum()


COMPILED = {
    "jit": (jit, lambda h: h),
    "aot_function": (lambda h: aot_function(h, "eager"), lambda h: h),
    "jit in jit": (lambda h: jit(lambda x: jit(h)(x)), lambda h: h),
    "jit(vmap)": (
        lambda h: jit(vmap(h, randomness="same")),
        lambda h: lambda x: torch.stack([h(r) for r in x]),
    ),
    "jit(grad)": (
        lambda h: jit(lambda x: grad_and_value(summed(h))(x)),
        lambda h: lambda x: (grads(summed(h))(x), h(x).sum()),
    ),
    "grad(jit)": (lambda h: grad(jit(summed(h))), lambda h: grads(summed(h))),
}
TENSORS = {
    "tensor": lambda f, c: lambda x: f(x, c),
    "parameter": lambda f, c: Holds(f, nn.Parameter(c, requires_grad=False)),
    "buffer": Holds,
}


def outcome(h, x):
    """The results of a call from one state of the generator, or the error."""
    torch.manual_seed(0)
    return h(x.clone())


def right_or_refused(compiled, plain, change, x):
    """Whether the first call was refused; otherwise it is right before and after ``change()``."""
    expected = outcome(plain, x)
    try:
        got = outcome(compiled, x)
    except CaptureError as error:
        assert "test_numbers.py" in str(error)
        return True
    assert_same(got, expected)
    change()
    assert_same(outcome(compiled, x), outcome(plain, x))
    return False


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("around", COMPILED)
@pytest.mark.parametrize("name", FORMS)
def test_forms(name, around):
    compile, reference = COMPILED[around]
    x = torch.arange(36.0).reshape(6, 6)
    for make in TENSORS.values():
        c = torch.tensor(1)
        h = make(FORMS[name], c)
        batch = torch.stack([x, x + 1]) if around == "jit(vmap)" else x
        refused = right_or_refused(compile(h), reference(h), lambda c=c: c.fill_(2), batch)
        assert refused == (name in REFUSED)


def test_module():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * float(self.scale)  # asked here

    with pytest.raises(
        CaptureError,
        match=r"a number was asked for .* from outside.*# asked here.*Python argument",
    ):
        aot_module(Scaled(), "eager")(torch.ones(2))


def test_a_cumulative_average_follows_its_count():
    """BatchNorm(momentum=None) divides by how many batches it has seen, a number in a buffer."""
    average = nn.BatchNorm1d(3, momentum=None)
    eager, compiled = copy.deepcopy(average), jit(average)
    for _ in range(3):
        x = torch.randn(4, 3)
        assert_same(compiled(x), eager(x))
        assert_same(average.state_dict(), eager.state_dict())


# asked through a transform inside: its inputs are as much from outside as what it closes over
INNER = {
    "argument": lambda x, w: x * grad(lambda w: w * w.item())(w),
    "closure": lambda x, w: grad(lambda x: (x * w.item()).sum())(x),
    "derived": lambda x, w: grad(lambda x: (x * float(w * 2)).sum())(x),
    "unbatched": lambda x, w: vmap(lambda r, w: r * w.item(), in_dims=(0, None))(x, w),
    "samples": lambda x, w: vmap(lambda r, w: r * w.item())(x, w.expand(2)),
    "twice": lambda x, w: grad(lambda x: vmap(lambda r: r * w.item())(x).sum())(x),
    "shape": lambda x, w: x * grad(lambda w: w * w.expand(3)[w.expand(3) > 1].numel())(w),
}


@pytest.mark.parametrize("name", INNER)
def test_inner_transforms(name):
    x, w = torch.ones(2), torch.tensor(2.0)
    f = lambda x: INNER[name](x, w)
    before = f(x)
    w.fill_(3.0)
    assert_same(f(x), before * 1.5 if name != "shape" else before)  # asked again at each call
    with pytest.raises(CaptureError, match=r"asked for.*test_numbers\.py"):
        jit(f)(x)


@pytest.mark.parametrize(
    "ask", [lambda r: r.sum().item(), lambda r: len(r[r > 0.5]), lambda r: int(r[0] * 9)]
)
def test_random_numbers_are_not_frozen(ask):
    generator = torch.Generator()
    for draw in (lambda: torch.rand(3), lambda: torch.rand(3, generator=generator)):
        with pytest.raises(CaptureError, match="asked for"):
            jit(lambda x, draw=draw: x * ask(draw()))(torch.ones(2))


def unseen_write(x):
    t = torch.ones(3)
    first = t[0]
    t.copy_(x[:3])
    return x * first.item()


def unseen_write_to_a_view(x):
    t = torch.ones(3)
    t[0].copy_(x[0])
    return x * t.sum().item()


@pytest.mark.parametrize("f", [unseen_write, unseen_write_to_a_view])
def test_constants_that_were_written_to(f):
    with pytest.raises(CaptureError, match="asked for"):
        jit(f)(torch.arange(4.0))


# made anew at each run: never another number
MADE_INSIDE = {
    "item": lambda x: x * torch.tensor(3).item(),
    "tolist": lambda x: x * sum(torch.tensor([1, 2]).tolist()),
    "numpy": lambda x: x * torch.tensor([1, 2]).numpy()[1],
    "if": lambda x: x if torch.tensor(True) else -x,
    "for": lambda x: x * sum(int(i) for i in torch.tensor([1, 2])),
    "index": lambda x: x[torch.tensor(2)] + x[: torch.tensor(2)],
    "mask": lambda x: x[torch.tensor([True, False, True, True])],
    "element of an array": lambda x: x * torch.arange(5)[3].item(),
    "LongTensor": lambda x: x * torch.LongTensor([1, 2])[1].item(),
    "new_tensor": lambda x: x * x.new_tensor([1, 2])[1].item(),
    "written": lambda x: x * torch.tensor(1).add_(2).item(),
    "shape": lambda x: x * torch.tensor(x.shape).prod().item(),
    "deepcopy": lambda x: x * copy.deepcopy(torch.tensor(3)).item(),
}


@pytest.mark.parametrize("around", COMPILED)
@pytest.mark.parametrize("name", MADE_INSIDE)
def test_constants_made_inside_may_be_asked(name, around):
    compile, reference = COMPILED[around]
    f, x = MADE_INSIDE[name], torch.arange(4.0)
    batch = torch.stack([x, x + 1]) if around == "jit(vmap)" else x
    assert_same(compile(f)(batch), reference(f)(batch))


def test_memory_of_numpy_is_outside():
    array = np.array([2.0, 3.0])
    with pytest.raises(CaptureError, match="asked for"):
        jit(lambda x: x * torch.from_numpy(array)[0].item())(torch.ones(2))
    f = jit(lambda x: x * torch.from_numpy(array))
    array[:] = 5.0
    assert_same(f(torch.ones(2)), torch.full((2,), 5.0, dtype=torch.float64))


def test_indices_read_from_memory():
    x, at = torch.arange(6.0), torch.tensor([1, 3])
    for split in (
        lambda x: x.tensor_split(at),
        lambda x: torch.tensor_split(x, tensor_indices_or_sections=at),
    ):
        with pytest.raises(CaptureError, match="asked for"):
            jit(split)(x)
        assert_same(vmap(split)(torch.stack([x, x]))[1], torch.stack([x, x])[:, 1:3])
    for given in (at, torch.tensor(2)):  # indices, and the number of parts
        for split in (
            lambda x, i: x.tensor_split(i)[1].sin().sum(),
            lambda x, i: torch.tensor_split(input=x, tensor_indices_or_sections=i)[1].sin().sum(),
        ):
            leaf = x.clone().requires_grad_()
            (want,) = torch.autograd.grad(split(leaf, given), leaf)
            assert_same(grad(split)(x, given), want)
            with pytest.raises(CaptureError, match="asked for"):
                jit(split)(x, given)
    for within in (
        lambda x: torch.tensor_split(x, torch.tensor([1, 3])),
        lambda x: x.tensor_split((1, 3)),
    ):
        assert_same(jit(within)(x), within(x))


def test_deepcopy_is_by_reference():
    w, norm, x = torch.tensor(3.0), nn.BatchNorm1d(3).eval(), torch.ones(2, 3)
    for f in (lambda x: x * copy.deepcopy(w), lambda x: copy.deepcopy(norm)(x)):
        compiled = jit(f)
        for value in (3.0, 4.0):
            w.fill_(value)
            norm.running_mean.fill_(value)
            assert_same(compiled(x), f(x))


def test_a_caller_may_fall_back():
    """A refusal of what is compiled inside of something that runs again at each call."""
    w = torch.tensor(2.0)
    f = lambda x: x * w.item()

    def either(x):
        try:
            return jit(f)(x)
        except CaptureError:
            return f(x)

    assert_same(vmap(either)(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    with pytest.raises(CaptureError, match="from outside"):
        jit(either)(torch.ones(3))


def test_tensor_is_as_before():
    names = ("__float__", "__bool__", "__repr__", "__index__")
    before = [getattr(torch.Tensor, name) for name in names]
    with pytest.raises(CaptureError):
        jit(lambda x: x * jit(lambda x: x * float(ONE))(x))(torch.ones(2))
    assert (
        [getattr(torch.Tensor, name) for name in names] == before
        and float(ONE) == 1
        and repr(ONE) == "tensor([1])"
    )


def test_gradients_of_outside_tensors():
    """Each backward pass may make another tensor."""
    weight = nn.Parameter(torch.ones(2))
    f = lambda x: x if weight.grad is None else -x * weight.grad
    compiled = jit(f)
    for weight.grad in (None, torch.ones(2), torch.full((2,), 3.0), None):
        assert_same(compiled(torch.ones(2)), f(torch.ones(2)))
    hidden = [weight * 2]
    with pytest.raises(
        CaptureError, match=r"\.grad was asked for.*test_numbers\.py.*as arguments"
    ):
        jit(lambda x: x if hidden[0].grad is None else -x)(torch.ones(2))
    weight.grad = torch.ones(2)
    assert_same(grad(lambda x: (x * weight.grad).sum())(torch.zeros(2)), torch.ones(2))
    assert_same(jit(lambda x, g: x * g)(torch.ones(2), weight.grad), torch.ones(2))


# what runs when derivatives or batches are taken, and may be made once for many calls


class ByFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * SCALE.item()


@torch.library.custom_op("aotfunc_numbers::scaled", mutates_args=())
def by_op(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


by_op.register_fake(torch.empty_like)
by_op.register_autograd(lambda ctx, g: g * SCALE.item())


def by_hook(x):
    y = x * 1
    y.register_hook(lambda g: g * SCALE.item())
    return y


SCALE = torch.tensor(2.0)


@pytest.mark.parametrize("f", [ByFunction.apply, by_op], ids=["Function", "custom_op"])
def test_derivatives_that_ask(f):
    x = torch.ones(2)
    with pytest.raises(CaptureError, match="from outside"):
        jit(grad(summed(f)))(x)
    with pytest.raises(CaptureError, match="from outside"):
        jit(f)(x.requires_grad_()).sum().backward()
    assert_same(grad(summed(f))(x), torch.full((2,), 2.0))


def test_a_hook_that_asks(monkeypatch):
    """Autograd calls it at each call; a transform records it."""
    scale = torch.tensor(2.0)
    monkeypatch.setitem(globals(), "SCALE", scale)
    x = torch.ones(2, requires_grad=True)
    f = jit(by_hook)
    for value in (2.0, 5.0):
        scale.fill_(value)
        x.grad = None
        f(x).sum().backward()
        assert_same(x.grad, torch.full((2,), value))
    assert_same(grad(summed(by_hook))(x.detach()), torch.full((2,), 5.0))
    with pytest.raises(CaptureError, match="from outside"):
        jit(grad(summed(by_hook)))(x.detach())
