"""A call like the last one takes a short way to its entry; whatever is different must be seen."""

import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributions import Distribution

from aotfunc import jit
from aotfunc.errors import CaptureError
from aotfunc.runtime.guards import check, keys
from aotfunc.runtime.repeated import OTHER


def f(x, y):
    return torch.tanh(x + y) * 2


def warm(f, *args):
    """Compiled, and called often enough for the short way."""
    compiled = jit(f)
    for _ in range(3):
        compiled(*args)
    assert compiled.captures == 1 and compiled._repeated is not None
    return compiled


def plain():
    return torch.randn(3, 4), torch.randn(3, 4)


OTHERS = {
    "shape": lambda x, y: (x[:2], y[:2]),
    "stride": lambda x, y: (torch.randn(4, 3).t(), y),
    "dtype": lambda x, y: (x.double(), y),
    "requires grad": lambda x, y: (x.requires_grad_(), y),
    "conjugated": lambda x, y: (torch.complex(x, y).conj(), y),
    "negated": lambda x, y: (torch._neg_view(x), y),
    "the same twice": lambda x, y: (x, x),
    "views of one memory": lambda x, y: (x, x.view(3, 4)),
    "a number": lambda x, y: (x, 2.0),
    "more": lambda x, y: (x.expand(2, 3, 4), y),
    "parameter": lambda x, y: (nn.Parameter(x), y),
    "meta": lambda x, y: (x.to("meta"), y.to("meta")),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_arguments(other):
    compiled = warm(f, *plain())
    args = OTHERS[other](*plain())
    for _ in range(3):
        got, expected = compiled(*args), f(*args)
        assert (got.shape, got.dtype, got.device) == (
            expected.shape,
            expected.dtype,
            expected.device,
        )
        assert got.requires_grad == expected.requires_grad
        if not got.is_meta:
            torch.testing.assert_close(got, expected)
        x, y = plain()
        torch.testing.assert_close(compiled(x, y), f(x, y))


@pytest.mark.parametrize("change", ["one less", "by name", "by both"])
def test_other_ways_to_pass(change):
    def g(x, y=3.0):
        return x * y

    x, y = plain()
    compiled = warm(g, x, y)
    if change == "one less":
        assert torch.equal(compiled(x), x * 3)
    elif change == "by name":
        assert torch.equal(compiled(x=x, y=y), x * y)
    else:
        assert torch.equal(compiled(x, y=y), x * y)


TREES = {
    "another key": lambda p: ({"w": p["w"], "c": p["b"]}, p["s"]),
    "another order": lambda p: ({"b": p["b"], "w": p["w"]}, p["s"]),
    "one more": lambda p: ({"w": p["w"], "b": p["b"], "c": p["b"] * 1}, p["s"]),
    "one less": lambda p: ({"w": p["w"]}, p["s"]),
    "a list for a tuple": lambda p: ({"w": p["w"], "b": p["b"]}, list(p["s"])),
    "another number": lambda p: ({"w": p["w"], "b": p["b"]}, (p["s"][0], 3, *p["s"][2:])),
    "true for one": lambda p: ({"w": p["w"], "b": p["b"]}, (p["s"][0], True, *p["s"][2:])),
    "1.0 for 1": lambda p: ({"w": p["w"], "b": p["b"]}, (p["s"][0], 1.0, *p["s"][2:])),
    "-0.0 for 0.0": lambda p: ({"w": p["w"], "b": p["b"]}, (*p["s"][:2], -0.0, *p["s"][3:])),
    "another word": lambda p: ({"w": p["w"], "b": p["b"]}, (*p["s"][:3], "sub")),
    "a number for a tensor": lambda p: ({"w": 2.0, "b": p["b"]}, p["s"]),
}


@pytest.mark.parametrize("other", TREES)
def test_trees(other):
    """Structure, keys and their order, plain values by class and bits."""

    def g(params, s):
        scale, k, zero, kind = s
        total = sum(i * v for i, v in enumerate(params.values(), 1)) * k + scale
        signed = torch.copysign(torch.ones(3), torch.full((3,), zero))
        kinds = {"k": type(k).__name__, "s": type(s).__name__, "names": [*params]}
        return total if kind == "add" else -total, signed, kinds

    p = {"w": torch.randn(3), "b": torch.randn(3), "s": (torch.randn(3), 1, 0.0, "add")}
    given = ({"w": p["w"], "b": p["b"]}, p["s"])
    compiled = warm(g, *given)
    args = TREES[other](p)
    for _ in range(3):
        for now in (args, given):
            for got, expected in zip(compiled(*now), g(*now), strict=True):
                assert (got == expected) if isinstance(got, dict) else torch.equal(got, expected)
    for got, expected in zip(compiled(params=args[0], s=args[1]), g(*args), strict=True):
        assert (got == expected) if isinstance(got, dict) else torch.equal(got, expected)


def test_other_surroundings():
    """Gradients, inference mode, autocast, the default dtype and device, a validated
    distribution."""
    w = torch.randn(4, 4)

    def g(x):
        return x @ w, torch.full((2,), 0.5)

    x = torch.randn(3, 4, requires_grad=True)
    compiled = warm(g, x)

    def same():
        for got, expected in zip(compiled(x), g(x), strict=True):
            assert got.dtype is expected.dtype and got.device == expected.device
            assert got.requires_grad == expected.requires_grad
            assert got.is_inference() == expected.is_inference()

    with torch.no_grad():
        same()
    with torch.inference_mode():
        same()
    with torch.autocast("cpu"):
        same()
    with torch.device("meta"):
        assert compiled(x)[1].is_meta
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        same()
    finally:
        torch.set_default_dtype(default)
    validated = Distribution._validate_args
    captures = compiled.captures
    try:
        Distribution.set_default_validate_args(not validated)
        same()
    finally:
        Distribution.set_default_validate_args(validated)
    assert compiled.captures == captures + 1
    same()


def test_other_globals_and_closures():
    rate, w = [2.0], [torch.ones(3)]
    compiled = warm(lambda x: x * rate[0] + w[0], torch.ones(3))
    rate[0] = 3.0
    assert compiled(torch.ones(3)).tolist() == [4.0] * 3
    w[0] = torch.zeros(3)
    assert compiled(torch.ones(3)).tolist() == [3.0] * 3
    w[0].add_(1)
    assert compiled(torch.ones(3)).tolist() == [4.0] * 3


def test_attributes_of_a_tensor():
    def g(x):
        return x * getattr(x, "scale", 1.0)

    x = torch.ones(3)
    compiled = warm(g, x)
    x.scale = 2.0
    assert compiled(x).tolist() == [2.0] * 3
    x.scale = 3.0
    assert compiled(x).tolist() == [3.0] * 3


def test_a_leaf_and_a_computed_tensor():
    def g(x):
        return x * (2 if x.is_leaf else 3)

    x = torch.ones(3, requires_grad=True)
    compiled = warm(g, x)
    assert compiled(x * 1).tolist() == [3.0] * 3
    assert compiled(x).tolist() == [2.0] * 3


def test_an_argument_that_is_closed_over():
    w = torch.ones(3)
    compiled = warm(lambda x: (x.add_(1), w * 1)[1], torch.zeros(3))
    assert compiled(w).tolist() == [2.0] * 3


def test_an_argument_like_one_that_is_closed_over():
    w, x = torch.ones(3), torch.ones(3)

    def g(x):
        return w * 2 if x is w else x * 3

    for first, other in ((x, w), (w, x)):
        compiled = warm(g, first)
        for given in (other, first, torch.zeros(3), other):
            assert torch.equal(compiled(given), g(given))
    assert warm(g, x)._repeated((x,), {}).tolist() == [3.0] * 3
    assert warm(g, x)._repeated((w,), {}) is OTHER


def test_a_closed_over_tensor_that_becomes_the_argument():
    w, x = torch.ones(3), torch.ones(3)
    compiled = warm(lambda x: (w is x, w * x), x)
    w = x
    assert compiled(x)[0] and not compiled(torch.ones(3))[0]


def test_calls_that_take_turns():
    rate, w = [2.0], torch.ones(())
    compiled = jit(lambda x: x * rate[0] * w)
    given = [torch.ones(n, requires_grad=yes) for n in (3, 5) for yes in (False, True)]
    for captures, now in enumerate((2.0, 3.0, 2.0, 4.0)):
        rate[0] = now
        for _ in range(3):
            for x in given:
                result = compiled(x)
                assert torch.equal(result, x * now) and result.requires_grad == x.requires_grad
                with torch.no_grad():
                    assert not compiled(x).requires_grad
        assert captures or compiled.captures == 8
    w = torch.zeros(())
    assert [compiled(x).sum().item() for x in given] == [0.0] * 4


def test_forgotten():
    x = torch.ones(3)
    compiled = warm(f, x, x + 1)
    compiled.forget()
    compiled(x, x + 1)
    assert compiled.captures == 1


def test_inside_transforms_of_torch():
    compiled = warm(f, *plain())
    x, y = plain()
    got = torch.func.vmap(compiled)(torch.stack([x, x]), torch.stack([y, y]))
    torch.testing.assert_close(got, torch.stack([f(x, y)] * 2))
    _, tangent = torch.func.jvp(compiled, (x, y), (x, y))
    torch.testing.assert_close(tangent, torch.func.jvp(f, (x, y), (x, y))[1])


def test_inside_a_trace_of_torch():
    compiled = warm(f, *plain())
    with pytest.raises(CaptureError, match=r"torch\.jit\.trace does not trace"):
        torch.jit.trace(compiled, plain(), check_trace=False)
    torch.testing.assert_close(compiled(*(args := plain())), f(*args))


def test_results_are_new_each_time():
    """One launch, called without Python between it and the checks."""
    compiled = warm(lambda x: torch.sin(x) * 2, torch.ones(8))
    x = torch.ones(8)
    first, second = compiled(x), compiled(x)
    first.zero_()
    assert torch.equal(second, torch.sin(x) * 2) and not first.requires_grad
    assert torch.equal(x, torch.ones(8))


@pytest.mark.parametrize("many", [False, True], ids=["Python", "native"])
def test_a_state_that_changes(monkeypatch, many):
    """Each thing that the check of a repeated call reads, in both forms."""
    monkeypatch.setattr(check, "MANY", 1 if many else 10**9)
    scale = [2.0]
    compiled = warm(lambda x, w: x @ w * scale[0], torch.ones(2, 2), torch.ones(2, 2))
    x, w = torch.ones(2, 2), torch.ones(2, 2)
    assert compiled(x, w).tolist() == [[4.0] * 2] * 2
    with torch.autocast("cpu"):
        assert compiled(x, w).dtype is torch.bfloat16
        assert compiled(x, w).dtype is torch.bfloat16
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(2, 2))
        tangent = forward_ad.unpack_dual(compiled(dual, w)).tangent
        assert tangent.tolist() == [[4.0] * 2] * 2
    assert compiled(x, w.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not compiled(x, w).requires_grad
    assert compiled(x, w).requires_grad
    scale[0] = 3.0
    assert compiled(x, w).tolist() == [[6.0] * 2] * 2


def test_from_threads_in_other_modes():
    compiled = warm(lambda x, w: x * w, torch.ones(3), torch.ones(3, requires_grad=True))
    x, w, found = torch.ones(3), torch.ones(3, requires_grad=True), []

    def quiet():
        with torch.no_grad():
            found.extend(compiled(x, w).requires_grad for _ in range(200))

    thread = threading.Thread(target=quiet)
    thread.start()
    assert all(compiled(x, w).requires_grad for _ in range(200))
    thread.join()
    assert found == [False] * 200


def test_the_quick_check_reads_as_much_of_the_surroundings_as_the_key():
    """One reading for each part of the key, which is compared itself where parts are more."""
    assert len(keys.READS) + len(keys.ATTRIBUTES) == len(keys.environment_key())
