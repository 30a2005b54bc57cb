"""Tensors that share memory without sharing a storage: two of one NumPy array, of overlapping
parts of it, of DLPack or a buffer. A write to one is seen through the others, as in eager mode."""

import numpy as np
import pytest
import torch
from torch import nn

from aotfunc import aot_function, aot_module, grad, jit, jvp, linearize, vjp, vmap
from aotfunc.errors import CaptureError

ARRAY = np.arange(1.0, 7.0, dtype=np.float32)


def of(array):
    return torch.from_numpy(array)


def same_array(a):
    return of(a), of(a)


def part(a):
    return of(a), of(a[2:])


def whole_second(a):
    return of(a[1:4]), of(a)


def strided_part(a):
    return of(a), of(a[1::2])


def rows(a):
    return of(a), of(a.reshape(2, 3)[1])


def alternating(a):
    return of(a[::2]), of(a[1::2])


def by_dlpack(a):
    x = of(a.copy())
    return x, torch.from_dlpack(x)


def of_its_own_array(a):
    x = torch.tensor(a)
    return x, of(x.numpy())


def in_a_buffer(a):
    buffer = bytearray(a.tobytes())
    return (
        torch.frombuffer(buffer, dtype=torch.float32),
        torch.frombuffer(buffer, dtype=torch.float32, offset=4),
    )


def with_a_view(a):
    x = of(a)
    return x, of(a)[1:], x[2:]


def apart(a):
    return of(a[:3]), of(a[3:])


LAYOUTS = [
    same_array,
    part,
    whole_second,
    strided_part,
    rows,
    alternating,
    by_dlpack,
    of_its_own_array,
    in_a_buffer,
    with_a_view,
    apart,
]


def write_first(x, y, *_):
    x.add_(1)
    return y * 2


def write_second(x, y, *_):
    y.mul_(3)
    return x + 1


def write_both(x, y, *_):
    x.add_(1)
    y.mul_(3)
    x.sub_(0.5)
    return x.sum() + y


def write_the_other(x, y, *_):
    y.copy_(y.flip(0))
    return x * 1, y * 1


def read_before_and_after(x, y, *_):
    before = y * 1
    x[1:3] = 7
    return before, y * 1, x * 1


PROGRAMS = [write_first, write_second, write_both, write_the_other, read_before_and_after]


WAYS = {
    "jit": lambda f: jit(f, backend="eager"),
    "aot_function": lambda f: aot_function(f, "eager"),
    "vjp": lambda f: lambda *args: vjp(f, *args)[0],
    "jvp": lambda f: lambda *args: jvp(f, args, tuple(map(torch.ones_like, args)))[0],
    "linearize": lambda f: lambda *args: linearize(f, *args)[0],
    "jit of jit": lambda f: jit(lambda *args: jit(f, backend="eager")(*args), backend="eager"),
    "closed over": lambda f: lambda *args: jit(lambda: f(*args), backend="eager")(),
}


def same(results, expected):
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_a_write_is_seen_through_all(layout, program, way):
    mine, theirs = layout(ARRAY.copy()), layout(ARRAY.copy())
    f = WAYS[way](program)
    for _ in range(2):
        same(f(*mine), program(*theirs))
        same(mine, theirs)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_calls_with_shared_memory_and_without(backend):
    f = jit(write_first, backend=backend)
    for layout in (apart, part, apart, same_array, apart, part):
        mine, theirs = layout(ARRAY.copy()), layout(ARRAY.copy())
        same(f(*mine), write_first(*theirs))
        same(mine, theirs)


def test_the_same_addresses_with_other_offsets():
    whole = torch.arange(8.0)

    def f(x, y):
        x.add_(1)
        return y.as_strided((2,), (1,), 0) * 1

    compiled = jit(f, backend="eager")
    for y in (whole[2:4], of(whole.numpy()[2:4]), whole[2:4]):
        expected = f(torch.ones(2), y)
        same(compiled(torch.ones(2), y), expected)


UNCOVERED = {
    "parts": lambda a: (of(a[:4]), of(a[2:])),
    "other dtype": lambda a: (of(a[:3]), of(a.view(np.complex64))),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_memory_that_none_covers_is_refused_only_if_written(case):
    array = ARRAY.copy()
    x, y = UNCOVERED[case](array)
    same(jit(lambda x, y: (x * 2, y * 2), backend="eager")(x, y), (x * 2, y * 2))
    for around in (lambda f: jit(f, backend="eager"), lambda f: lambda *a: vjp(f, *a)[0]):
        with pytest.raises(CaptureError, match="none of them covers"):
            around(lambda x, y: (x.add_(1) * 1.0, y * 1.0))(x, y)
    assert (array == ARRAY).all()


def test_parameters_and_buffers_of_one_array():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            array = ARRAY.copy()
            self.weight = nn.Parameter(of(array))
            self.register_buffer("mean", of(array))

        def forward(self, x):
            self.mean.mul_(0.5)
            return (self.weight * x).sum()

    for around in (lambda m: aot_module(m, "eager"), lambda m: jit(m, backend="eager")):
        mine, theirs = Tied(), Tied()
        f = around(mine)
        for _ in range(3):
            x = torch.full((6,), 2.0, requires_grad=True)
            f(x).backward()
            same(x.grad, theirs.weight.detach() * 0.5)
            theirs(torch.ones(6))
            same((mine.weight, mine.mean), (theirs.weight, theirs.mean))


@pytest.mark.parametrize("way", ["jit", "vjp"])
def test_the_derivative_is_that_at_the_values_computed_with(way):
    array = ARRAY.copy()
    x, w = of(array), of(array).requires_grad_()

    def f(x, w):
        y = w * w
        x.zero_()
        return y + w

    y = jit(f, backend="eager")(x, w) if way == "jit" else vjp(lambda w: f(x, w), w)[0]
    same(y.detach(), of(ARRAY) ** 2)
    (g,) = torch.autograd.grad(y.sum(), w)
    same(g, 2 * of(ARRAY) + 1)


def test_a_number_after_a_write_through_another_tensor():
    x, y = part(ARRAY.copy())

    def f(w, x, y):
        y.add_(1)
        return w * x.sum().item() * float(y[0])

    same(grad(lambda w: f(w, x, y))(torch.ones(())), torch.tensor((21.0 + 4) * 4))


# ----- tensors of an array's memory that the function makes itself -------------------------------

MAKERS = {
    "from_numpy": lambda a: torch.from_numpy(a),
    "as_tensor": lambda a: torch.as_tensor(a),
    "asarray": lambda a: torch.asarray(a),
    "frombuffer": lambda a: torch.frombuffer(a, dtype=torch.float32),
    "from_dlpack": lambda a: torch.from_dlpack(a),
}
AROUND = {
    "jit": lambda f: jit(f, backend="eager"),
    "aot_function": lambda f: aot_function(f, "eager"),
    "vjp": lambda f: lambda x: vjp(f, x)[0],
    "vmap": lambda f: lambda x: vmap(f)(x[None])[0],
    "jit of grad": lambda f: jit(
        lambda x: grad(lambda x: f(x).sum())(x) * 0 + f(x), backend="eager"
    ),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("road", MAKERS)
class TestMadeInside:
    def test_written(self, road, around):
        array = ARRAY.copy()
        f = AROUND[around](lambda x: MAKERS[road](array).add_(x) * 1)
        with pytest.raises(CaptureError, match="would not show"):
            f(torch.ones(6))
        assert (array == ARRAY).all()

    def test_written_and_nobody_else_has_the_array(self, road, around):
        f = AROUND[around](lambda x: MAKERS[road](ARRAY.copy()).mul_(x) * x)
        for _ in range(2):
            same(f(torch.full((6,), 2.0)), of(ARRAY) * 4)

    def test_read_anew_at_each_call(self, road, around):
        array = ARRAY.copy()
        f = AROUND[around](lambda x: MAKERS[road](array) * x)
        for _ in range(3):
            same(f(torch.full((6,), 2.0)), of(array) * 2)
            array += 1

    def test_written_by_numpy_after_the_read(self, road, around):
        array = ARRAY.copy()

        def f(x):
            t = MAKERS[road](array)
            y = t * x
            array[0] += 1
            return y + t

        with pytest.raises(CaptureError, match="writes to an array"):
            AROUND[around](f)(torch.ones(6))
        if around not in ("vjp", "vmap"):
            assert (array == ARRAY).all()


@pytest.mark.parametrize("around", AROUND)
def test_a_buffer_that_is_filled_again(around):
    def f(x):
        buffer, total = np.zeros(6, np.float32), 0.0
        for k in range(3):
            buffer[:] = k
            total = total + torch.from_numpy(buffer) * x + torch.tensor(buffer)
        return total

    same(AROUND[around](f)(torch.full((6,), 2.0)), torch.full((6,), 9.0))


def test_an_equal_array_in_place_of_the_captured_one():
    f = jit(lambda x, a: torch.from_numpy(a) * x, backend="eager")
    first, second = ARRAY.copy(), ARRAY.copy()
    same(f(torch.ones(6), first), of(ARRAY))
    first[:] = 0
    same(f(torch.ones(6), second), of(ARRAY))


@pytest.mark.parametrize("around", ["jit", "vjp"])
@pytest.mark.parametrize(
    "view",
    [lambda t: t, lambda t: t[1:], lambda t: t.view(2, 3).t(), lambda t: t.view(torch.int32)],
)
def test_a_returned_tensor_shares_the_array(view, around):
    array = ARRAY.copy()
    compiled = jit(lambda x: (view(torch.from_numpy(array)), x * 2), backend="eager")
    once = lambda x: vjp(lambda x: (view(torch.from_numpy(array)), x * 2), x)[0]
    for _ in range(2):
        shown, _ = (compiled if around == "jit" else once)(torch.ones(2))
        same(shown, view(of(array)))
        assert shown.stride() == view(of(array)).stride()
        array += 1
        same(shown, view(of(array)))
        shown.zero_()
        same(shown, view(of(array)))
        array[:] = ARRAY


def test_a_returned_conjugate_of_an_array():
    array = np.array([1 + 2j, 3j])
    f = lambda x: (torch.from_numpy(array).conj(), torch.from_numpy(array).imag, x * 2)
    same(jit(f, backend="eager")(torch.ones(2)), f(torch.ones(2)))
    same(vjp(f, torch.ones(2))[0], f(torch.ones(2)))


def test_an_array_that_the_function_reads_beside_a_tensor_of_it():
    array = ARRAY.copy()
    t = of(array)
    reads = jit(lambda x: t * x + float(array[0]), backend="eager")
    for _ in range(2):
        same(reads(torch.ones(6)), of(array) + float(array[0]))
        array += 1
    before = array.copy()

    def writes(x):
        t.add_(1)
        return x * float(array[0])

    def numpy_writes(x):
        y = t * x
        array[0] = 0
        return y

    for f in (writes, numpy_writes):
        with pytest.raises(CaptureError, match="reads an array"):
            jit(f, backend="eager")(torch.ones(6))
        assert (array == before).all()


def test_from_dlpack_of_an_argument_is_refused():
    with pytest.raises(CaptureError, match="no memory for from_dlpack"):
        jit(lambda x: torch.from_dlpack(x) * 2, backend="eager")(torch.ones(3))


HAS_ARRAYS = {
    "of a tensor from outside": lambda c, x: (c.numpy(), c.add_(1), x * c)[::2],
    "of a part": lambda c, x: (c[1:].numpy(), c.add_(1), x * c)[::2],
    "of the whole, a part is written": lambda c, x: (c.numpy(), c[1:].add_(1), x * c)[::2],
    "of a value": lambda c, x: (lambda y: (y.numpy(), y.add_(1), x))(c * 2)[::2],
    "by asarray": lambda c, x: (lambda y: (np.asarray(y), y.add_(1), x))(c * 2)[::2],
    "a tensor of an array": lambda c, x: (torch.from_numpy(c.numpy()), c.add_(1))[0] * x,
}


@pytest.mark.parametrize("name", HAS_ARRAYS)
def test_an_array_of_what_is_written_then(name):
    c = torch.ones(3)
    with pytest.raises(CaptureError, match="would not show it"):
        vjp(lambda x: HAS_ARRAYS[name](c, x), torch.ones(3))
    same(c, torch.ones(3))


def test_an_array_that_is_gone_or_a_copy():
    c = torch.ones(3)

    def f(x):
        k, n = float(c.numpy().sum()), c.numpy().copy()
        c.add_(1)
        return x * c * k * float(n.sum()) * float(c.numpy().sum())

    same(vjp(f, torch.ones(3))[0], torch.full((3,), 108.0))
    with pytest.raises(ValueError, match="read-only"):
        vjp(lambda x: (c.numpy().fill(0), x)[1], torch.ones(3))


def test_arrays_are_put_back_where_the_function_is_captured_twice():
    array = np.zeros(2)

    def f(x):
        array[0] += 1
        return x * float(array[0])

    compiled = jit(f, backend="eager")
    for k in (1.0, 2.0, 3.0):
        same(compiled(torch.ones(2)), torch.full((2,), k))
        assert array[0] == k
