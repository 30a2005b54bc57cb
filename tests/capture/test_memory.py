"""Arguments that lie in one buffer: a write to one is seen through those that overlap it, and
through no others."""

import pytest
import torch

import aotfunc
from aotfunc.errors import CaptureError
from aotfunc.trace.memory import places_of


def writes(a, b):
    a.mul_(2)
    b.add_(1)
    return (a * 3).sum() + (b * b).sum()


def reads_after(a, b):
    before = b.sum()
    a.add_(10)
    return before + b.sum()


def through_views(a, b):
    a[0] = 7
    b[..., -1:].mul_(3)
    return a.sum() - b.sum()


#: two parts of a buffer of 24, each of two samples with the same shapes
PARTS = {
    "beside": lambda buf: (buf[:12].view(2, 6), buf[12:].view(2, 6)),
    "the same": lambda buf: (buf[:12].view(2, 6), buf[:12].view(2, 6)),
    "interleaved": lambda buf: (buf[::2].view(2, 6), buf[1::2].view(2, 6)),
    "columns": lambda buf: (buf.view(2, 12)[:, :6], buf.view(2, 12)[:, 6:]),
    "inside": lambda buf: (buf.view(2, 12), buf.view(2, 12)[:, 3:5]),
    "inside, in steps": lambda buf: (buf.view(2, 12), buf.view(2, 12)[:, 1::4]),
    "at an offset": lambda buf: (buf[4:].view(2, 10), buf[4:].view(2, 10)[:, 2:6]),
    "a column": lambda buf: (buf.view(2, 3, 4), buf.view(2, 3, 4)[:, :, 1]),
}
WAYS = {
    "make_fx": lambda f: lambda a, b: aotfunc.make_fx(f)(a, b)(a, b),
    "jit": aotfunc.jit,
    "vjp": lambda f: lambda a, b: aotfunc.vjp(f, a, b)[0],
    "jvp": lambda f: lambda a, b: aotfunc.jvp(f, (a, b), (a.clone(), b.clone()))[0],
    "jit of vjp": lambda f: aotfunc.jit(lambda a, b: aotfunc.vjp(f, a, b)[0]),
    "vjp of jit": lambda f: lambda a, b: aotfunc.vjp(aotfunc.jit(f), a, b)[0],
}


def compare(way, f, parts):
    mine, theirs = torch.arange(24.0), torch.arange(24.0)
    got, want = way(f)(*parts(mine)), f(*parts(theirs))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("f", [writes, reads_after, through_views])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_one_buffer(way, parts, f):
    compare(WAYS[way], f, PARTS[parts])


@pytest.mark.parametrize("f", [writes, reads_after, through_views])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("nested", [False, True])
def test_samples_of_parts_of_one_buffer(nested, parts, f):
    mine, theirs = torch.arange(24.0), torch.arange(24.0)
    a, b = PARTS[parts](mine)
    g = aotfunc.vmap(lambda a, b: aotfunc.vjp(f, a, b)[0]) if nested else aotfunc.vmap(f)
    got = g(a, b)
    want = torch.stack([f(x, y) for x, y in zip(*PARTS[parts](theirs), strict=True)])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_compiled_function_tells_parts_apart_on_each_call():
    f = aotfunc.jit(reads_after)
    for parts in (*PARTS.values(), *PARTS.values()):
        compare(lambda _: f, reads_after, parts)


@pytest.mark.parametrize(
    "parts",
    [
        lambda buf: (buf[:4], buf[2:6]),  # neither covers the other
        lambda buf: (buf[:6], buf[:6].view(torch.int32)),  # seen as another type
    ],
)
def test_overlaps_that_no_tensor_covers_are_refused(parts):
    with pytest.raises(CaptureError, match="overlap in memory"):
        aotfunc.make_fx(reads_after)(*parts(torch.arange(8.0)))


def test_samples_that_reach_into_each_other_are_refused():
    buf = torch.arange(8.0)
    with pytest.raises(CaptureError, match="overlap in memory"):
        aotfunc.vmap(reads_after)(buf[:4].view(2, 2), buf[2:6].view(2, 2))
    with pytest.raises(CaptureError, match="overlap in memory"):
        aotfunc.vmap(reads_after, in_dims=(0, None))(buf.view(2, 4), buf[:4])


def test_the_derivative_of_a_write_into_a_part():
    def f(whole, x):
        part = whole[1:3]
        inner = aotfunc.vjp(lambda w, p: (p.mul_(x), w.sum())[1], whole, part)[0]
        return inner * x

    aotfunc.check_grads(
        lambda w, x: f(w.clone(), x), (torch.randn(5).double(), torch.randn(()).double()), order=2
    )


def test_as_strided_of_a_written_tensor_at_an_offset():
    def f(x):
        y = x.as_strided((2,), (2,), x.storage_offset() + 1)
        x.add_(1)
        y.mul_(2)
        return x.sum() + x.as_strided((2, 2), (2, 1), x.storage_offset())[1].sum()

    for way in WAYS.values():
        compare(
            lambda f, way=way: lambda a, b: way(lambda a, b: f(a))(a, b),
            lambda a, b=None: f(a),
            lambda buf: (buf[5:9], buf[:2]),
        )


def test_layout():
    buf = torch.zeros(10)
    groups = [p.group for p in places_of([buf[:5], buf[5:], buf[4:6], torch.zeros(3), buf[2:2]])]
    assert groups[0] == groups[1] == groups[2] != groups[3] and groups.count(groups[4]) == 1
    even, odd = places_of([buf[::2], buf[1::2]])
    assert even.group != odd.group


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_as_strided_counts_in_the_memory_of_a_sample(dim):
    xs = torch.randn(4, 3, 5).movedim(0, dim)
    for f in (torch.sin, torch.clone, lambda x: x.t().contiguous().t(), lambda x: x.clone()[1:]):
        g = lambda x, f=f: f(x).as_strided((2, 2), (1, 3), f(x).storage_offset() + 1)
        assert torch.equal(
            aotfunc.vmap(g, in_dims=dim)(xs), torch.stack([g(x) for x in xs.unbind(dim)])
        )


def test_a_write_to_a_conjugate_reaches_the_value():
    def f(x):
        x = x * 1
        x.conj().mul_(1 + 2j)
        x.conj().resolve_conj().mul_(3)  # a copy
        x.resolve_conj().add_(0.5)  # the value itself
        x.mH[0].mul_(2j)
        return x, x.conj()

    x = torch.randn(3, 3, dtype=torch.complex128)
    for got in (aotfunc.make_fx(f)(x)(x), aotfunc.jit(f)(x), aotfunc.vjp(f, x)[0]):
        torch.testing.assert_close(got, f(x))
    xs = torch.randn(2, 3, 3, dtype=torch.complex128)
    torch.testing.assert_close(aotfunc.vmap(f)(xs)[0], torch.stack([f(x)[0] for x in xs]))
    aotfunc.check_grads(f, (x,), order=2)


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (lambda x: x.add_(1), torch.arange(6.0).unfold(0, 4, 2)),
        (lambda x: x.expand(2, 3)[1:].fill_(3), torch.ones(3)),
        (lambda x: x.expand(2, 3).mul_(3), torch.ones(3)),
    ],
)
def test_a_write_where_elements_share_memory_is_refused(f, x):
    with pytest.raises(CaptureError, match="share memory"):
        aotfunc.make_fx(f)(x)


@pytest.mark.parametrize("f", [lambda x: x.clone().resize_as_(x), lambda x: x.clone().set_(x)])
def test_memory_taken_from_another_tensor_is_refused(f):
    with pytest.raises(CaptureError, match="shape or memory of another"):
        aotfunc.make_fx(f)(torch.ones(3))
