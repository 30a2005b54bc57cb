"""``x.data = y`` inside a compiled function gives arguments and tensors from outside other memory,
at every call, as in eager mode."""

import copy

import pytest
import torch
from torch import nn

from aotfunc import aot_module, jit
from aotfunc.errors import CaptureError
from tests.aot.compiled_by import COMPILERS, every_compiler
from tests.reference import assert_same


def shrink(k, q):
    k.data /= k.data.norm()


def twice(k, q):
    k.data = k.data.clamp(-0.1, 0.1)
    k.data = k.data * 2
    k.data.add_(1)


def around_writes(k, q):
    k.data.mul_(2)
    k.data = k.data + 1
    k.mul_(2)


#: what is done to each pair of a slow and a fast parameter
UPDATES = {
    "momentum": lambda k, q: setattr(k, "data", k.data * 0.9 + q.data * 0.1),
    "in place": lambda k, q: k.data.mul_(0.9).add_(q.data, alpha=0.1),
    "copied": lambda k, q: setattr(k, "data", q.data.clone()),
    "drawn": lambda k, q: setattr(k, "data", torch.randn_like(k)),
    "parts of one": lambda k, q: setattr(k, "data", torch.cat([k, q], -1)[..., : k.shape[-1]] + 0),
    "divided": shrink,
    "twice": twice,
    "around writes": around_writes,
}


def nets(grads):
    torch.manual_seed(0)
    fast, slow = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2))
    return fast.double(), slow.double().requires_grad_(grads)


def training(update, before, grads, wrap):
    """Each of four calls: the loss, gradients, weights, their old memory, and whether it is
    theirs no more."""
    fast, slow = nets(grads)
    old = []

    def step(x):
        first = slow(x).sum() if before else 0.0
        with torch.no_grad():
            for q, k in zip(fast.parameters(), slow.parameters(), strict=True):
                update(k, q)
        return (fast(x) * slow(x)).sum() + first

    compiled, found = wrap(step), []
    for n in range(4):
        old = [p.data for p in slow.parameters()]
        loss = compiled(torch.full((5, 3), 0.1 * n, dtype=torch.float64))
        found += [loss.detach(), *(p.detach().clone() for p in slow.parameters()), *old]
        if not (before and grads):  # eager's backward has the new values there
            loss.backward()
            found += [
                p.grad.clone() for p in (*fast.parameters(), *slow.parameters()) if p.requires_grad
            ]
        found.append(
            torch.tensor(
                [p.data_ptr() == x.data_ptr() for p, x in zip(slow.parameters(), old, strict=True)]
            )
        )
        with torch.no_grad():
            for p in fast.parameters():
                p -= 0.01 * p
    return found


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("update", UPDATES)
def test_weights_that_follow_others(update, before, grads):
    want = training(UPDATES[update], before, grads, lambda f: f)
    assert_same(training(UPDATES[update], before, grads, jit), want)


@every_compiler
@pytest.mark.parametrize("update", ["momentum", "twice"])
def test_every_compiler(update, compiler):
    want = training(UPDATES[update], False, True, lambda f: f)
    assert_same(training(UPDATES[update], False, True, COMPILERS[compiler]), want)


def test_a_backward_has_the_values_that_were_computed_with():
    w = nn.Parameter(torch.ones(3))

    def f(x):
        y = (w.exp() * x).sum()
        w.data = w.data * 2
        return y + (w.exp() * x).sum()

    jit(f)(torch.ones(3)).backward()
    assert_same(w.grad, torch.full((3,), 1.0).exp() + torch.full((3,), 2.0).exp())


@pytest.mark.parametrize("compiler", ["jit", "aot_function", "inlined"])
def test_arguments_and_what_is_returned(compiler):
    w = nn.Parameter(torch.ones(3))

    def f(x, c):
        before = w.detach()
        w.data, x.data = w.data + c, c * 3
        return w, w[0], x, x[1:], before, w * x

    compiled = COMPILERS[compiler](f)
    for n in range(3):
        x, c, old = torch.ones(3), torch.full((3,), float(n)), w.data
        version, given = w._version, x.data
        ours, first, argument, part, before, product = compiled(x, c)
        assert ours is w
        assert argument is x
        assert_same((w.data, old, given, x), (old + c, before, torch.ones(3), c * 3))
        assert_same((first, part, product), (w[0], x[1:], w * x))
        assert first.data_ptr() == w.data_ptr() != old.data_ptr() == before.data_ptr()
        assert (w._version, part.data_ptr()) == (version, x.data_ptr() + 4)
        product.sum().backward()
        assert_same(w.grad, x)
        w.grad = None


def test_one_tensor_given_twice():
    x = torch.ones(3)
    assert_same(jit(lambda a, b: setattr(a, "data", b * 2) or a + b)(x, x), torch.full((3,), 4.0))
    closed = jit(lambda a: setattr(a, "data", a * 2) or x + a)
    assert_same((closed(x), closed(x), x), tuple(torch.full((3,), v) for v in (8.0, 16.0, 8.0)))


def test_part_of_a_flat_tensor():
    def world():
        flat = torch.arange(6.0)
        w = nn.Parameter(flat[2:5])

        def f(x):
            w.data = w.data * 2
            flat.add_(1)
            return w * x + flat[:3]

        return f, flat, w

    (f, *state), (g, *others) = world(), world()
    compiled = jit(f)
    for _ in range(3):
        assert_same(compiled(torch.ones(3)), g(torch.ones(3)))
        assert_same(state, others)


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean.data = self.mean.data * 0.9 + x.detach().mean(0) * 0.1
        return self.lin(x - self.mean)


def test_a_buffer_of_a_compiled_module():
    eager = Running()
    compiled = aot_module(copy.deepcopy(eager))
    for n in range(3):
        x = torch.randn(4, 3) + n
        got, want = compiled(x), eager(x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))
        got.sum().backward()
        want.sum().backward()


#: what would be done to the stand-in alone
AFTERWARDS = {
    "detached": lambda x: x.detach_(),
    "made to require grad": lambda x: x.requires_grad_(),
    "hooked": lambda x: x.register_hook(lambda g: g * 5),
    "retained": lambda x: x.retain_grad(),
    "written": lambda x: x.mul_(2),
    "reshaped": lambda x: x.t_(),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_refused_afterwards(name):
    leaf = torch.ones(2, 2, requires_grad=name != "made to require grad")
    x = leaf * 1
    with pytest.raises(CaptureError, match="in place: do that before"):
        jit(lambda x: (setattr(x, "data", x * 2), AFTERWARDS[name](x), x * 3)[2])(x)
    assert_same(x.detach(), torch.ones(2, 2))
    with pytest.raises(CaptureError, match="detached or hooked before"):
        jit(lambda x: (x.detach_(), setattr(x, "data", x * 2), x * 3)[2])(x)


REFUSED = {
    "returned by a compiled function inside": lambda w, b, x: jit(
        lambda x: (setattr(w, "data", x * 2), w[0])[1]
    )(x),
    "the memory of another": lambda w, b, x: setattr(w, "data", b.data),
    "one for two": lambda w, b, x: (setattr(w, "data", y := x * 2), setattr(b, "data", y)),
    "another dtype": lambda w, b, x: setattr(w, "data", w.data.double()),
    "another shape": lambda w, b, x: setattr(w, "data", x[0]),
    "other strides": lambda w, b, x: setattr(w, "data", x.t() * 1),
    "in a checkpoint": lambda w, b, x: torch.utils.checkpoint.checkpoint(
        lambda x: setattr(w, "data", x * 1) or x, x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    w, b = nn.Parameter(torch.ones(2, 2)), torch.zeros(2, 2)
    memory = w.data_ptr(), b.data_ptr()
    with pytest.raises(CaptureError, match=r"`\.data = `"):
        jit(lambda x: (w * 2, REFUSED[name](w, b, x)))(torch.ones(2, 2))
    assert (w.data_ptr(), b.data_ptr()) == memory
    assert_same((w.data, b), (torch.ones(2, 2), torch.zeros(2, 2)))


def swapped(wrap, a, b):
    def f(x):
        before = a.data.clone()
        a.data, b.data = b.data.clone(), before
        return a * x + b

    compiled = wrap(f)
    for n in range(3):
        compiled(torch.full((3,), n + 1.0)).sum().backward()
        yield a, b, a.grad, b.grad


def written_through_data(wrap, a, b):
    flat = torch.arange(5.0)
    a.data = flat[:3]

    def f(x):
        a.data = a.data * 2
        a.data.add_(1)
        a.detach().mul_(2)
        return a * x + flat[1:4]

    compiled = wrap(f)
    for _ in range(3):
        y = compiled(b.detach())
        y.sum().backward()
        yield y, a, a.grad, flat


def followed_numbers(wrap, a, b):
    compiled = wrap(lambda x, m: setattr(a, "data", a.data * m + x * (1 - m)) or a * b)
    for n in range(5):
        yield compiled(torch.full((3,), n + 1.0), 1 - 0.1 * n), a


def snapshots(wrap, a, b):
    compiled, seen = wrap(lambda x: setattr(a, "data", a.data * 2) or a * x), []
    for _ in range(3):
        seen.append(a.detach())
        yield compiled(b.detach()), *seen


def errors(wrap, a, b):
    def f(x, fails):
        a.data = a.data * 2
        if fails:
            raise KeyError
        return a * x

    compiled = wrap(f)
    for n in range(4):
        if n % 2:
            with pytest.raises(KeyError):
                compiled(b.detach(), True)
        else:
            compiled(b.detach(), False)
        yield (a,)


def changed_outside(wrap, a, b):
    compiled = wrap(lambda x: setattr(a, "data", a.data * 0.9 + x.detach()) or a * x)
    for n in range(5):
        with torch.set_grad_enabled(n != 1):
            compiled(b * n)
        yield (a.clone(),)
        a.requires_grad_(n % 2 == 0)
        if n == 3:
            a.data = torch.full((3,), 7.0)


@every_compiler
@pytest.mark.parametrize(
    "program",
    [swapped, written_through_data, followed_numbers, snapshots, errors, changed_outside],
)
def test_calls_one_after_the_other(program, compiler):
    found = []
    for wrap in (lambda f: f, COMPILERS[compiler]):
        steps = program(wrap, *(nn.Parameter(torch.ones(3) * k) for k in (1, 2)))
        found.append([[t.detach().clone() for t in step] for step in steps])
    assert_same(found[1], found[0])
