"""Look-ups, cut, padded and joined tensors, changes of shape in kernels: values as in eager mode,
no memory read that is not the tensors'."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from aotfunc import grad, jit
from aotfunc.backends.loops import native
from tests.backends.test_cpp import against_the_interpreter, agree, floats, kernels_of
from tests.kernels import every_kernel
from tests.sweeps import seeds

pytestmark = pytest.mark.usefixtures("cache")

I = torch.tensor([3, 0, 6, 6, 1])
SHOWN = {
    "a column": (lambda x: x[:, 3].exp() * 2, floats(37, 19)),
    "a row below": (lambda x, y: x[-2] * y + 1, floats(37, 19), floats(37, 19)),
    "columns": (lambda x: x[:, 2:13].exp(), floats(37, 19)),
    "every third": (lambda x: x[1::3].exp(), floats(37, 19)),
    "neighbours": (lambda x: (x[1:] - x[:-1]) * (x[1:] + x[:-1]), floats(70)),
    "neighbours in rows": (lambda x: (x[:, 1:] - x[:, :-1]).square().sum(-1), floats(9, 70)),
    "computed neighbours": (lambda x: (lambda y: y[1:] * y[:-1])(x * 2 + 1), floats(70)),
    "of what is stored too": (lambda x: (lambda y: (y, y[:, :5] * 2))(x.exp()), floats(9, 70)),
    "flipped": (lambda x: x.flip(1) * x, floats(9, 20)),
    "a diagonal": (lambda x: x.diagonal().exp(), floats(9, 20)),
    "below the diagonal": (lambda x: x.diagonal(-2).exp() * 2, floats(9, 20)),
    "unbound": (lambda x: (lambda q, k, v: q * k + v)(*x.unbind(1)), floats(5, 3, 7)),
    "in parts": (lambda x: (lambda a, b, c: a * b + c.exp())(*x.split(7, 1)), floats(9, 21)),
    "in parts of several sizes": (lambda x: x.split([2, 5, 3], -1)[1].exp(), floats(9, 10)),
    "in chunks": (lambda x: [c.exp() * 2 for c in x.chunk(3)], floats(7, 5)),
    "slices of slices": (lambda x: x[3:, 2:][1:-1, ::2].exp(), floats(20, 21)),
    "reduced": (lambda x: x[:, 4:].exp().sum(0), floats(9, 21)),
}
RESHAPED = {
    "split": (lambda x, y: x.view(5, 4, 3) * y, floats(20, 3), floats(5, 4, 3)),
    "merged": (lambda x, y: (x * 2).view(20, 3) * y, floats(5, 4, 3), floats(20, 3)),
    "merged and a row": (
        lambda x, b: (x.exp().view(-1, 12) + b).tanh(),
        floats(5, 4, 3),
        floats(12),
    ),
    "regrouped": (lambda x, y: (x + 1).view(6, 4, 5).exp() * y, floats(2, 12, 5), floats(6, 4, 5)),
    "two ways": (lambda x: ((x * 2).view(6, 10), (x * 2).exp()), floats(3, 20)),
    "reduced after merging": (lambda x: x.exp().view(5, 12).sum(-1), floats(5, 4, 3)),
    "reduced after splitting": (lambda x: x.exp().view(5, 4, 3).sum(1), floats(20, 3)),
    "all of it": (lambda x: x.exp().view(-1).sum(), floats(5, 4, 3)),
    "unmergeable": (lambda x: x.t().reshape(-1).exp(), floats(5, 4)),
    "with ones": (lambda x, y: x.view(5, 1, 4, 1, 3) * y, floats(20, 1, 3), floats(1, 4, 1, 1)),
    "sliced after": (lambda x: x.view(5, 12)[:, 2:7].exp(), floats(5, 4, 3)),
    "memory sliced after merging": (lambda x: x.view(60)[7:50].exp(), floats(5, 4, 3)),
    "heads": (lambda x: x.view(2, 7, 3, 4).transpose(1, 2).softmax(-1), floats(2, 7, 12)),
}
LOOKED_UP = {
    "rows": (lambda x, i: x[i].exp() * 2, floats(7, 19), I),
    "rows from the end": (lambda x, i: x[i - 7].exp() * 2, floats(7, 19), I),
    "negative rows": (lambda x, i: x[i].exp() * 2, floats(7, 19), I - 7),
    "columns": (lambda x, i: x[:, i].exp() * 2, floats(9, 7), I),
    "pairs": (lambda x, i, j: x[i, j].exp(), floats(7, 7), I, I.flip(0)),
    "pairs apart": (lambda x, i, j: x[i, :, j].exp(), floats(7, 3, 7), I, I.flip(0)),
    "broadcast": (lambda x, i, j: x[i[:, None], j].exp(), floats(7, 7), I, I.flip(0)),
    "by a copy": (lambda x, i: x[i.expand(3, 5).clone()].exp(), floats(7, 4), I),
    "of what was computed": (lambda x, i: (x.exp() * 2)[i[:1]], floats(7, 19), I),
    "gathered": (lambda x, i: x.gather(1, i).exp(), floats(7, 19), torch.randint(19, (7, 4))),
    "gathered columns": (
        lambda x, i: x.gather(0, i).exp(),
        floats(7, 19),
        torch.randint(7, (4, 19)),
    ),
    "selected": (lambda x, i: x.index_select(1, i).exp(), floats(9, 7), I),
    "embedded": (lambda w, i: F.embedding(i, w) * 2 + 1, floats(7, 19), torch.randint(7, (3, 5))),
    "int32": (lambda x, i: x[i].exp() * 2, floats(7, 19), I.int()),
    "doubles": (lambda x, i: x[i].exp() * 2, floats(7, 19).double(), I),
    "longs": (lambda x, i: x[i] * 2 + 1, torch.arange(70).reshape(7, 10), I),
    "bools": (lambda x, i: x[i] & (i > 2)[:, None], floats(7, 10) > 0, I),
    "strided": (lambda x, i: x[i[::2]].exp(), floats(14, 19)[::2, ::2], torch.randint(7, (9,))),
    "summed": (lambda x, i: x[i].exp().sum(0), floats(7, 19), I),
    "a row of two": (
        lambda x, i: (x[i[0]] - x[i[1]]).exp(),
        floats(7, 19),
        torch.randint(7, (2, 9)),
    ),
}
PADDED = {
    "padded": (lambda x: F.pad(x, (2, 3)).exp(), floats(9, 21)),
    "padded by a number": (lambda x: F.pad(x, (2, 0, 0, 1), value=1.5) * 2, floats(9, 21)),
    "cut": (lambda x: F.pad(x, (-2, 3, 1, -1)).exp(), floats(9, 21)),
    "joined": (lambda x, y: torch.cat([x, y], 1) * 2 + 1, floats(9, 21), floats(9, 4)),
    "joined rows": (lambda x, y: torch.cat([x * 2, y]).exp(), floats(9, 21), floats(4, 21)),
    "joined with nothing": (lambda x, y: torch.cat([x, y]).exp(), floats(9, 21), floats(0, 21)),
    "stacked": (lambda x, y: torch.stack([x, y], 1).exp(), floats(9, 21), floats(9, 21)),
    "rotated halves": (lambda x: torch.cat([-x[..., 5:], x[..., :5]], -1) * x, floats(9, 10)),
    "a triangle": (lambda x: x.tril() + x.triu(1) * 2, floats(9, 21)),
    "nan outside": (lambda x: x.tril().exp(), torch.full((9, 9), math.nan).tril(-1) + 1),
    "causal": (
        lambda x: x.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf).softmax(-1),
        floats(3, 9, 9),
    ),
    "one hot": (lambda i: (torch.arange(9) == i[:, None]).float() * 2, I),
    "counted": (lambda x: x * torch.arange(21) + torch.arange(3, 87, 4), floats(9, 21)),
    "counted in floats": (lambda x: x * torch.arange(21.0), floats(9, 21)),
    "the unit matrix": (lambda x: x + torch.eye(9, 21) * 3, floats(9, 21)),
    "of doubles": (lambda x: F.pad(x, (2, 3)).exp(), floats(9, 21).double()),
    "of longs": (lambda x: F.pad(x, (2, 3)) * 2 + 1, torch.arange(60).reshape(5, 12)),
    "of bools": (lambda x: F.pad(x, (2, 3)) & ~F.pad(x, (3, 2)), floats(9, 21) > 0),
}


@pytest.mark.parametrize("case", SHOWN)
def test_shown(case):
    agree(*SHOWN[case], kernels=None)


@pytest.mark.parametrize("case", RESHAPED)
def test_reshaped(case):
    agree(*RESHAPED[case], kernels=None)


@pytest.mark.parametrize("case", LOOKED_UP)
def test_looked_up(case):
    agree(*LOOKED_UP[case], kernels=None)


@pytest.mark.parametrize("case", PADDED)
def test_padded(case):
    agree(*PADDED[case], kernels=None)


WRONG = {
    "rows": lambda x, i: x[i].exp(),
    "columns": lambda x, i: x[:, i].exp(),
    "gathered": lambda x, i: x.gather(0, i[:, None]).exp(),
    "selected": lambda x, i: x.index_select(0, i).exp(),
    "embedded": lambda x, i: F.embedding(i, x).exp(),
    "a class": lambda x, i: F.cross_entropy(x, i),
    "a sliced index": lambda x, i: x[i][:1].exp(),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("wrong", [7, -8, -1, 2**40])
def test_an_index_out_of_range(case, wrong):
    """Raises what eager mode raises."""
    f, x, i = WRONG[case], floats(7, 7), torch.tensor([0, 1, 2, 3, 4, 5, wrong])
    try:
        want = f(x, i)
    except (IndexError, RuntimeError) as error:
        with pytest.raises(type(error)) as raised:
            jit(f, backend=every_kernel)(x, i)
        assert str(raised.value).split(" at ")[0] == str(error).split(" at ")[0]
    else:
        assert_close(jit(f, backend=every_kernel)(x, i), want)


@pytest.mark.parametrize("ignored", [[3], range(9)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy(weighted, reduction, ignored):
    target = torch.randint(19, (9,))
    target[list(ignored)] = -100
    weight = torch.rand(19) if weighted else None
    f = lambda x: F.cross_entropy(x, target, weight, reduction=reduction)
    agree(f, floats(9, 19), kernels=None)
    agree(grad(lambda x: f(x).square().sum()), floats(9, 19), kernels=None)


GRADIENTS = {
    "sliced": (lambda x: x[:, 2:9].exp() * x[:, :7], floats(9, 12)),
    "selected": (lambda x: x[:, 2].exp() * x[:, 3], floats(9, 12)),
    "joined": (lambda x: torch.cat([-x[:, 6:], x[:, :6]], 1) * x, floats(9, 12)),
    "padded": (lambda x: F.pad(x, (1, 2), value=2.0).square(), floats(9, 12)),
    "looked up": (lambda x: x[I].exp() * 2, floats(9, 12)),
    "a triangle": (lambda x: x.exp().tril().square(), floats(9, 12)),
    "heads": (lambda x: x.view(3, 3, 4, 3).transpose(1, 2).exp().softmax(-1), floats(9, 12)),
    "unbound": (
        lambda x: (lambda a, b, c: a * b + c.exp())(*x.view(9, 3, 4).unbind(1)),
        floats(9, 12),
    ),
    "in parts": (lambda x: (lambda a, b: a * b.exp())(*x.split(6, 1)), floats(9, 12)),
    "every second": (lambda x: x[:, ::2].exp() * x[:, 1::2], floats(9, 12)),
    "every third row": (lambda x: x[1:8:3].exp() * 2, floats(9, 12)),
    "rows and columns apart": (lambda x: x[2::4, 1:-1:5].exp(), floats(12, 20)),
    "pairs": (lambda x: torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(1) * x, floats(9, 12)),
    "the greatest": (lambda x: x.max(1).values * 3, floats(9, 12)),
    "the least of columns": (lambda x: x.min(0, keepdim=True).values * x, floats(9, 12)),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(case):
    f, x = GRADIENTS[case]
    agree(grad(lambda x: f(x).square().sum()), x, kernels=None, rtol=1e-4, atol=1e-4)


P = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0])
#: pooling: the largest, or the mean, of each window
WINDOWS = {
    "squares": (lambda x: F.max_pool2d(x, 2), floats(2, 3, 8, 10)),
    "places": (lambda x: F.max_pool2d(x, 2, return_indices=True), floats(2, 3, 9, 37)),
    "overlapping": (lambda x: F.max_pool2d(x, 3, 2, return_indices=True), floats(3, 9, 38)),
    "oblong": (
        lambda x: F.max_pool2d(x, (2, 3), return_indices=True),
        floats(2, 1, 8, 12).double(),
    ),
    "special": (
        lambda x: F.max_pool2d(x, 2, return_indices=True),
        P[torch.randint(6, (2, 3, 16, 16))],
    ),
    "padded": (lambda x: F.max_pool2d(x, 3, 1, 1), floats(2, 3, 8, 10)),
    "channels last": (
        lambda x: F.max_pool2d(x, 2),
        floats(2, 3, 8, 10).contiguous(memory_format=torch.channels_last),
    ),
    "means of squares": (lambda x: F.avg_pool2d(x, 2), floats(2, 3, 8, 10)),
    "a rest": (lambda x: F.avg_pool2d(x, (2, 1)), floats(2, 3, 9, 11)),
    "means that overlap": (lambda x: F.avg_pool2d(x, 3, 1), floats(3, 9, 38)),
    "steps": (lambda x: F.avg_pool2d(x, 2, 3), floats(3, 9, 38)),
    "another divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), floats(1, 2, 8, 8)),
    "means, padded": (lambda x: F.avg_pool2d(x, 3, 1, 1), floats(2, 3, 8, 10)),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (4, 5)), floats(2, 3, 8, 10)),
    "adaptive to other windows": (lambda x: F.adaptive_avg_pool2d(x, 3), floats(2, 3, 8, 10)),
    "to one": (lambda x: F.adaptive_avg_pool2d(x, 1), floats(2, 3, 8, 10)),
    "to none": (lambda x: F.adaptive_avg_pool2d(x.detach(), 0).sum() + x, floats(3, 8, 10)),
    "of doubles": (lambda x: F.avg_pool2d(x, 2), floats(2, 3, 8, 10).double()),
    "means, channels last": (
        lambda x: F.avg_pool2d(x, 2),
        floats(2, 3, 8, 10).contiguous(memory_format=torch.channels_last),
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case):
    f, x = WINDOWS[case]
    agree(f, x, kernels=None)
    value = lambda x: y if isinstance(y := f(x), Tensor) else y[0]
    agree(grad(lambda x: value(x).nan_to_num(0, 0, 0).square().sum()), x, kernels=None)


def laid_out(x):
    """The ways in which it may lie in memory."""
    layouts = {"plain": x}
    if x.dim() > 1:
        layouts["turned"] = x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.shape[-1] > 1:
        layouts["expanded"] = x[..., :1].expand(x.shape)
    return layouts


#: every function that says where something is: first of those that are equal, or NaN
SOUGHT = {
    "rows": lambda x: (x.argmax(-1), x.argmin(-1, keepdim=True)),
    "columns": lambda x: (x.argmax(0), x.argmin(0, keepdim=True)),
    "all": lambda x: (x.argmax(), x.argmin()),
    "all as they are": lambda x: (x.argmax(keepdim=True),),
    "with values": lambda x: (*x.max(-1), *x.min(0, keepdim=True), *x.min(-1)),
}


@pytest.mark.parametrize("case", SOUGHT)
def test_sought(case):
    for layout in ("plain", "turned"):
        agree(SOUGHT[case], laid_out(P[torch.randint(len(P), (9, 37))])[layout], kernels=None)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32],
    ids=str,
)
def test_all_that_is_sought(dtype):
    """In one program, so that one compilation has all kernels."""
    values = torch.tensor([-1.0, 0, 2, 2]) if dtype in (torch.int32, torch.int64) else P
    small = [(9, 1), (1, 5), (70,), (1,)] if dtype in (torch.float32, torch.int64) else []
    for shape in [(9, 37), (3, 4, 70), *small]:
        for x in laid_out(values[torch.randint(len(values), shape)].to(dtype)).values():
            agree(lambda x: [y for f in SOUGHT.values() for y in f(x)], x, kernels=None)


def test_nothing_is_sought_in_vain():
    with pytest.raises(IndexError):
        jit(lambda x: x.argmax(1), backend=every_kernel)(torch.empty(3, 0))
    agree(lambda x: x.argmax(1) + 1, torch.empty(0, 3), kernels=None)
    agree(lambda x: x.argmax() + 1, torch.tensor(2.0), kernels=None)


SCATTERED = {
    "a row's element": (
        lambda x, i, y: x.scatter(1, i, y) * 2,
        *(floats(9, 37), torch.randint(37, (9, 1)), floats(9, 1)),
    ),
    "a column's element": (
        lambda x, i, y: x.scatter(0, i, y).exp(),
        *(floats(9, 37), torch.randint(9, (1, 37)), floats(1, 37)),
    ),
    "a number": (lambda x, i: x.scatter(1, i, 2.5) * 2, floats(9, 37), torch.randint(37, (9, 1))),
    "one hot": (
        lambda i: torch.zeros(9, 37).scatter(1, i, 1.0) * 2,
        torch.randint(37, (9, 1)),
    ),
    "several": (
        lambda x, i, y: x.scatter(1, i, y) * 2,
        *(floats(9, 37), torch.arange(20).repeat(9, 1), floats(9, 20)),
    ),
    "of doubles": (
        lambda x, i: x.scatter(-1, i, 2) * 2,
        *(floats(9, 37).double(), torch.randint(37, (9, 1))),
    ),
}


@pytest.mark.parametrize("case", SCATTERED)
def test_scattered(case):
    agree(*SCATTERED[case], kernels=None)


def test_what_is_scattered_is_in_range():
    f = jit(lambda x, i: x.scatter(1, i, 2.5) * 2, backend=every_kernel)
    f(floats(3, 5), torch.tensor([[0], [4], [2]]))
    for bad in (5, -1):
        with pytest.raises(RuntimeError, match=f"index {bad} is out of bounds for dimension 1"):
            f(floats(3, 5), torch.tensor([[0], [bad], [2]]))


def random_program(seed: int):
    """Ops that take elements from elsewhere, between such as compute."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.int64])
    shape = [rng.choice([1, 2, 3, 4, 6, 9, 17]) for _ in range(rng.randint(1, 3))]
    plan = [[rng.random() for _ in range(6)] for _ in range(rng.randint(2, 7))]
    x = (torch.randn(shape) * 3).to(dtype)
    if rng.random() < 0.3:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)

    def step(x: Tensor, kind: int, u: list[float]) -> Tensor:
        d = int(u[1] * x.dim())
        n = x.shape[d]
        if kind == 0:
            start = int(u[2] * n)
            return x.narrow(d, start, 1 + int(u[3] * (n - start)))
        if kind == 1:
            pads = [0] * (2 * (x.dim() - 1 - d)) + [int(u[2] * 4) - 1, int(u[3] * 3)]
            return F.pad(x, pads, value=1) if n + sum(pads) > 0 else x
        if kind == 2 and x.dim() > 1:
            return x.select(d, int(u[2] * n))
        if kind == 3:
            return torch.cat([x, x.narrow(d, 0, 1 + int(u[2] * n) // 2) * 2], d)
        if kind == 4:
            i = (torch.arange(1 + int(u[2] * 9)) * 7) % n
            return x.index_select(d, i)
        if kind == 5 and x.dim() > 1:
            e = int(u[2] * (x.dim() - 1))
            return x.reshape(*x.shape[:e], -1, *x.shape[e + 2 :])
        if kind == 6 and n % 2 == 0:
            return x.reshape(*x.shape[:d], 2, n // 2, *x.shape[d + 1 :])
        if kind == 7:
            return x.flip(d)
        if kind == 8 and x.dim() > 1:
            return x.transpose(d, 0)
        if kind == 9 and x.dim() > 1:
            return x.tril(int(u[2] * 3) - 1)
        if kind == 10:
            return x.gather(d, (torch.arange(x.numel()).reshape(x.shape) * 5) % n)
        if kind == 11:
            return x.sum(d, keepdim=True) + x
        if kind == 12 and x.dim() > 1:
            return torch.stack([x, x * 2], d)
        if kind == 13:
            return x.split(1 + int(u[2] * n), d)[-1]
        if kind == 14:
            return x.split([n // 2, n - n // 2], d)[1]
        if kind == 16:
            return torch.slice_copy(x, d, int(u[2] * n), None, 1 + int(u[3] * 3))
        if kind == 17 and x.dim() > 1:
            return x.diagonal(int(u[2] * 3) - 1, d, (d + 1) % x.dim())
        if kind == 18 and x.dim() < 4:
            return x.unfold(d, 1 + int(u[2] * n), 1 + int(u[3] * 3))
        if kind == 19:
            return x.sort(d).values  # no kernel: reads the whole
        if kind == 15:
            return x + x.argmax(d, keepdim=True).to(dtype)
        return x.clamp(-2, 2) * 1.5 if dtype.is_floating_point else x * 3 - 1

    def f(x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for u in plan:
            x = step(values[int(u[4] * len(values))], int(u[0] * 22), u)
            if x.numel() == 0:  # a diagonal beside the matrix
                x = values[-1]
            values.append(x + 1)
        return tuple(values[-3:])

    return f, x


@pytest.mark.parametrize("seed", seeds(30))
def test_random_programs(seed):
    """Against eager, and each kernel against its interpretation."""
    f, x = random_program(seed)
    want = f(x)
    got = jit(f, backend=every_kernel)(x)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.stride() == b.stride()
    for kernel in kernels_of(f, x):
        if not kernel.checks:  # indices are no random memory
            against_the_interpreter(kernel)


def test_ten_sizes_are_compiled_once(cache):
    def f(x, i):
        y = torch.cat([x[:, 9:], x[:, :9]], 1)[i] * x.view(-1, 3, 9).flip(1).reshape(-1, 27)[i]
        return F.cross_entropy(F.pad(y, (1, 2)), i.clamp(max=2))

    step = jit(grad(f), backend="cpp")
    for n in range(4, 14):
        x, i = floats(n, 27), torch.randint(n, (n,))
        assert_close(step(x, i), grad(f)(x, i))
    assert step.captures == 10 and len(native.LOADED) == 1
