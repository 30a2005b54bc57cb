"""Errors that ops raise for values, and that the function catches: in a transform that runs once
they are raised where the op is called."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from aotfunc import checkpoint, grad, hessian, jit, jvp, make_fx, vjp, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same


def with_jitter(a):
    for jitter in (0.0, 0.1, 10.0):
        try:
            return torch.linalg.cholesky(a + jitter * torch.eye(2))
        except RuntimeError:
            pass
    raise ValueError


def by_definiteness(a):
    def is_positive():
        try:
            torch.linalg.cholesky(a)
        except torch.linalg.LinAlgError:
            return False
        return True

    return a * 3 if is_positive() else a * a


def inverse(a):
    try:
        return torch.linalg.inv(a)
    except RuntimeError:
        return torch.sin(a)


def solution_in_a_helper(a):
    def solve():
        with torch.enable_grad():
            return torch.linalg.solve(a, torch.ones(2))

    try:
        return solve()
    except Exception:
        return a * a
    finally:
        torch.ones(1)


FUNCTIONS = [with_jitter, by_definiteness, inverse, solution_in_a_helper]
MATRICES = [torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 4.0]]), -torch.eye(2)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("k", range(3))
def test_as_eager(function, k):
    def f(a):
        return function(a * 1).sum()

    a = MATRICES[k].clone().requires_grad_()
    value = f(a)
    (want,) = torch.autograd.grad(value, a)
    given = a.detach()
    got, pull = vjp(f, given)
    assert_same((got, pull(torch.ones(()))[0], grad(f)(given)), (value.detach(), want, want))
    assert_same(vmap(grad(f))(torch.stack([given, given])), torch.stack([want, want]))
    twice = [
        g(lambda a, g=g: g(lambda b: f(b).sin())(a).sum())(given) for g in (grad, torch.func.grad)
    ]
    torch.testing.assert_close(*twice)
    hessian(f)(given)


def test_a_compiled_function_raises_the_error():
    for f in (with_jitter, by_definiteness):
        compiled = jit(lambda a, f=f: f(a).sum())
        assert_same(compiled(torch.eye(2)), f(torch.eye(2)).sum())
        with pytest.raises(torch.linalg.LinAlgError):
            compiled(-torch.eye(2))


ROW = torch.tensor([1.0, -2.0, 3.0, 0.5])
BAD = torch.tensor([0, 4])


def written(x):
    y = x.clone()
    y[BAD] = 9.0
    return y


#: ops that raise an error for these values
RAISING = {
    "x[i]": lambda x: x[BAD],
    "x[i] of one": lambda x: x[BAD[1]],
    "x[computed]": lambda x: x[BAD + 1],
    "x[i] = y": written,
    "narrow": lambda x: x.narrow(0, BAD[1], 1),
    "gather": lambda x: x.gather(0, BAD),
    "take": lambda x: x.take(BAD),
    "index_add_": lambda x: (x * 1).index_add_(0, BAD, x[:2]),
    "scatter": lambda x: x.scatter(0, BAD, x[:2]),
    "embedding": lambda x: F.embedding(BAD, x[:, None]),
    "embedding_bag": lambda x: F.embedding_bag(BAD, x[:, None], torch.tensor([0])),
    "cross_entropy": lambda x: F.cross_entropy(x[None], torch.tensor([7])),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x, x.detach().sigmoid()),
    "division": lambda x: x * (torch.tensor([1, 2, 3, 4]) // torch.tensor(0)),
    "one_hot": lambda x: x * F.one_hot(torch.tensor(5), 4),
    "eigh of NaN": lambda x: torch.linalg.eigh(x[:, None] * x * float("nan"))[0],
    "multinomial": lambda x: x[torch.multinomial(torch.tensor([-1.0, 2.0]), 1)],
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([1, -1, 1, 1])),
    "a shape": lambda x: x @ torch.ones(3),
    "index_reduce": lambda x: x.index_reduce(0, BAD, x[:2], "mean"),
    "one_hot of a negative": lambda x: x * F.one_hot((x < 0).long() - 1).sum(),
    "lu_unpack": lambda x: torch.lu_unpack(x.view(2, 2), BAD.int())[2] * x[0],
    "lu_solve": lambda x: torch.linalg.lu_solve(x.view(2, 2), BAD.int() + 1, x.view(2, 2)),
    "histc": lambda x: x * torch.histc(x / 0.0, 3).sum(),
    "pinv of NaN": lambda x: torch.linalg.pinv(x.view(2, 2) * float("nan")),
    "bernoulli": lambda x: x * torch.bernoulli(x.detach()),
    "normal": lambda x: x * torch.normal(x.detach(), x.detach()),
    "poisson": lambda x: x * torch.poisson(x.detach()),
}
DRAWS = ("multinomial", "bernoulli", "normal", "poisson")


class Swallowing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return True


def by_try(op, x):
    with torch.enable_grad():
        try:
            return op(x).sum()
        except (IndexError, RuntimeError):
            return (x * x).sum()


def by_suppress(op, x):
    with contextlib.suppress(IndexError, RuntimeError), torch.enable_grad():
        return op(x).sum()
    return (x * x).sum()


def by_a_manager(op, x):
    out = (x * x).sum()
    with Swallowing():
        out = op(x).sum()
    return out


def by_a_decorator(op, x):
    out = [(x * x).sum()]

    @ignoring()
    def attempt():
        out.append(op(x).sum())

    attempt()
    return out[-1]


@contextlib.contextmanager
def ignoring():
    with contextlib.suppress(IndexError, RuntimeError):
        yield


@pytest.mark.parametrize("catch", [by_try, by_suppress, by_a_manager, by_a_decorator])
@pytest.mark.parametrize("name", RAISING)
def test_errors_for_values(name, catch):
    f = lambda x: catch(RAISING[name], x)
    x = ROW.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(x), x)
    before = torch.get_rng_state()
    assert_same(grad(f)(ROW), want)
    assert_same(grad(checkpoint(f))(ROW), want)
    assert_same(jvp(f, (ROW,), (torch.ones(4),))[1], want.sum())
    if name not in DRAWS:
        assert_same(vmap(grad(f))(torch.stack([ROW, ROW])), torch.stack([want, want]))
    assert_same(torch.get_rng_state(), before)


class Manager:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left = True


class Noting(Manager):
    errors: list = []

    def __exit__(self, kind, value, where):
        self.errors.append(kind)


class Translating(Manager):
    def __exit__(self, *_):
        raise KeyError("another")


class Choosing(Manager):
    def __exit__(self, *_):
        return hasattr(self, "left") or True


@contextlib.contextmanager
def restoring():
    try:
        with torch.enable_grad():
            yield
    finally:
        for _ in range(2):
            torch.is_grad_enabled()


@contextlib.contextmanager
def around(manager):
    with manager:
        yield


@contextlib.contextmanager
def translating():
    try:
        yield
    except IndexError:
        raise KeyError from None


@contextlib.contextmanager
def returning():
    try:
        yield
    finally:
        return  # noqa: B012


@contextlib.contextmanager
def inner():
    with restoring(), ignoring():
        yield


HEEDING = {
    "a class": Swallowing,
    "notes": Noting,
    "another": Translating,
    "computed": Choosing,
    "an argument": lambda: around(Swallowing()),
    "an error": translating,
    "return": returning,
    "nested": inner,
}
NOT_HEEDING = {"a class": Manager, "finally": restoring, "PyTorch's": torch.enable_grad}


@pytest.mark.parametrize("name", HEEDING)
def test_managers_that_heed_errors(name):
    manager = HEEDING[name]

    def f(x, after):
        out = (x * x).sum()
        try:
            with torch.enable_grad(), manager(), restoring():
                with torch.enable_grad():
                    x.sum()
                out = x[BAD].sum()
                after.append(1)
        except (KeyError, IndexError) as e:
            return out * len(str(type(e)))
        return out * 2

    x = ROW.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(x, []), x)
    after = []
    assert_same(grad(f)(ROW, after), want)
    assert not after


@pytest.mark.parametrize("name", NOT_HEEDING)
def test_managers_that_do_not(name):
    """They do not make the transform ask for values."""
    manager, after = NOT_HEEDING[name], []

    def f(x):
        try:
            with manager():
                out = x[BAD].sum()
                after.append(1)
        finally:
            after.append(2)
        return out

    with pytest.raises(IndexError):
        grad(f)(ROW)
    assert after == [1, 2]


def test_draws_where_errors_are_caught():
    def f(x, seed):
        g = torch.Generator().manual_seed(seed)
        try:
            i = torch.multinomial(x, 2)
            j = torch.multinomial(x, 2, generator=g)
            return (x[i] * x[j] * torch.bernoulli(x, generator=g)[j]).sum() * torch.rand(())
        except RuntimeError:
            return x.sum()

    x = torch.tensor([0.2, 0.9, 0.6, 0.4], requires_grad=True)
    for seed in range(3):
        torch.manual_seed(seed)
        (want,) = torch.autograd.grad(f(x, seed), x)
        torch.manual_seed(seed)
        assert_same(grad(f)(x.detach(), seed), want)


def test_an_error_that_is_not_caught_comes_from_the_program():
    for f in (lambda x: x[BAD].sum(), lambda x: by_no_grad(x)):
        with pytest.raises(IndexError):
            grad(f)(ROW)


def by_no_grad(x):
    with torch.enable_grad():
        return x.gather(0, BAD.clamp(max=3)).sum() + x[BAD].sum()


Y = torch.ones(4)

#: what eager mode runs, and aotfunc refuses
REFUSED = {
    "set_": lambda x: x.mul(1).set_(Y),
    "swap_tensors": lambda x: torch.utils.swap_tensors(x, Y),
    "a hook": lambda x: x.mul(2).register_post_accumulate_grad_hook(lambda x: None),
    "in a transform": lambda x: grad(lambda y: y.mul(1).set_(Y).sum())(x),
    "in a batch": lambda x: vmap(lambda y: y.sum() if y > 0 else y, randomness="same")(x),
}


@pytest.mark.parametrize("catch", [by_try, by_suppress, by_a_manager, by_a_decorator])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("over", [grad, vmap, jit, lambda f: lambda x: make_fx(f)(x)])
def test_a_refusal_that_the_function_catches(name, catch, over):
    """Eager mode, which refuses nothing, would not have gone that way."""
    x = torch.stack([ROW, ROW]) if over is vmap else ROW.clone()
    with pytest.raises(CaptureError):
        over(lambda x: catch(REFUSED[name], x) + x.sum())(x)
    assert_same(Y, torch.ones(4))
    assert_same(grad(torch.sum)(ROW), torch.ones(4))  # a later capture knows nothing of it


def test_another_error_after_a_refusal():
    def f(x):
        try:
            x.mul(1).set_(Y)
        except RuntimeError:
            raise KeyError("the branch that eager mode does not take") from None

    with pytest.raises(CaptureError, match="set_"):
        grad(f)(ROW)


#: writes that eager mode refuses: nothing is written
LEAF_WRITES = {
    "add_": lambda w: w.add_(1),
    "an element": lambda w: w.__setitem__(0, 7.0),
    "a view": lambda w: w[1:].mul_(2),
    "zero_": lambda w: w.zero_(),
    "resize_": lambda w: w.mul(1).resize_(2),
    "larger": lambda w: w.resize_(7),
    "other memory": lambda w: w.detach()[:3].copy_(w.detach()[1:].expand(2, 3)),
}


LEAVES = {
    "requires_grad_": lambda x: torch.arange(4.0).requires_grad_(),
    "a Parameter": lambda x: torch.nn.Parameter(torch.arange(4.0)),
    "a detached argument": lambda x: x.detach().requires_grad_(),
}


@pytest.mark.parametrize("name", LEAF_WRITES)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("over", [grad, jit])
def test_a_refused_write_has_not_happened(name, leaf, over):
    def f(x):
        w = LEAVES[leaf](x)
        try:
            LEAF_WRITES[name](w)
        except RuntimeError:
            return (w.detach() * x).sum() * 3
        raise AssertionError

    x = ROW.clone()
    want = f(x) if over is jit else 3 * LEAVES[leaf](x)
    assert_same(over(f)(x), want.detach())


def test_a_refused_change_of_shape_has_not_happened():
    def f(x):
        try:
            x.resize_(7)
        except RuntimeError:
            return (x * 3).sum()

    assert_same(grad(f)(ROW), torch.full((4,), 3.0))
