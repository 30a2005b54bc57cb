"""In torch.func's place: its names, its keywords, patch_torch_func, rearrange, dictionaries in
another order."""

import subprocess
import sys
from collections import OrderedDict, namedtuple

import pytest
import torch
from functorch.einops import rearrange as theirs  # in torch.func from 2.12 on

import aotfunc
from aotfunc import grad, jacrev, jvp, linearize, make_fx, patch_torch_func, rearrange, vjp, vmap
from aotfunc.errors import ArgumentError
from tests.reference import assert_same, loop

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_every_name_of_torch_func_is_there():
    assert not [n for n in torch.func.__all__ if not hasattr(aotfunc, n)]


@pytest.mark.parametrize(
    "keywords",
    [{"chunk_size": 1, "_preallocate_and_copy": True}, {"_preallocate_and_copy": False}],
)
def test_keywords_of_jacrev(keywords):
    assert_same(jacrev(torch.sin, **keywords)(X[0]), torch.diag(X[0].cos()))


@pytest.mark.parametrize("more", [(), (True,), (True, True), (None, False)])
def test_vjp_fn_takes_autograds_flags(more):
    f = lambda x: vjp(torch.sin, x)[1](torch.ones_like(x), *more)[0]
    assert_same(f(X), X.cos())
    assert_same(make_fx(f)(X)(X), X.cos())
    assert_same(
        vjp(torch.sin, X)[1](torch.ones_like(X), retain_graph=True, create_graph=True)[0], X.cos()
    )
    two = lambda x: (x.sin(), x.cos())
    assert_same(vjp(two, X)[1]((X, X), *more)[0], X * X.cos() - X * X.sin())


# ----- patch_torch_func --------------------------------------------------------------------------

NAMES = [
    "functionalize",
    "grad",
    "grad_and_value",
    "hessian",
    "jacfwd",
    "jacrev",
    "jvp",
    "linearize",
    "vjp",
    "vmap",
]


def test_patched_and_back():
    import functorch

    before, functorchs = {n: getattr(torch.func, n) for n in NAMES}, functorch.grad
    outer = patch_torch_func()
    with patch_torch_func():
        assert all(getattr(torch.func, n) is getattr(aotfunc, n) for n in NAMES)
        assert torch.vmap is vmap and functorch.grad is grad
        from torch.func import hessian

        assert hessian is aotfunc.hessian
        assert_same(torch.vmap(torch.func.grad(lambda x: x.sin().sum()))(X), X.cos())
    assert torch.func.grad is grad
    outer.undo()
    outer.undo()
    assert {n: getattr(torch.func, n) for n in NAMES} == before
    assert torch.vmap is before["vmap"] and functorch.grad is functorchs
    with pytest.raises(ZeroDivisionError), patch_torch_func():
        raise ZeroDivisionError
    assert torch.func.grad is before["grad"]


def test_rules_derived_while_patched():
    """In a new process, where no rule has been derived yet."""
    program = (
        "import torch, aotfunc; aotfunc.patch_torch_func(); x = torch.randn(3, 4, 4, 4); f = "
        "lambda x: torch.special.spherical_bessel_j0(x) + torch.nn.functional.avg_pool2d(x, "
        "2).sum(); torch.testing.assert_close(torch.vmap(f)(x), torch.stack([f(r) for r in x]))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ----- rearrange ---------------------------------------------------------------------------------

Z = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
PATTERNS = [
    ("a b c d -> d c b a", {}),
    ("a b c d -> (a b) (c d)", {}),
    ("a b (c e) d -> a e (b d) c", {"e": 2}),
    ("a b c (d e f) -> f a (e c) b d", {"d": 3, "e": 1}),
    ("... d -> d ...", {}),
    ("a ... d -> a (...) d", {}),
    ("a ... -> (a ...)", {}),
    ("a b c d -> a 1 b (c d)", {}),
    ("a b c d -> a () b c d", {}),
]


@pytest.mark.parametrize(("pattern", "sizes"), PATTERNS)
def test_rearrange(pattern, sizes):
    assert_same(rearrange(Z, pattern, **sizes), theirs(Z, pattern, **sizes))
    single = lambda x: rearrange(x, pattern, **sizes)
    assert_same(vmap(single)(torch.stack([Z, Z + 1])), loop(single)(torch.stack([Z, Z + 1])))


def test_rearrange_of_several():
    assert_same(
        rearrange([Z[0], Z[1]], "n a b c -> a (n b) c"), Z.transpose(0, 1).reshape(3, 8, 6)
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "a b c d",
        "a b c -> a b c",
        "a b c d -> a b c",
        "a a b c -> a b c",
        "a b (c e) d -> a b c e d",
        "a - -> a",
    ],
)
def test_patterns_that_do_not_fit(pattern):
    with pytest.raises(ArgumentError, match="rearrange: "):
        rearrange(Z, pattern)
    with pytest.raises(ArgumentError, match="sizes of"):
        rearrange(Z, "a b (c e) d -> a b c e d", e=3)


# ----- dictionaries in another order -------------------------------------------------------------

Pair = namedtuple("Pair", "left right")
P = {"a": X[0], "b": {"c": X[1], "d": X[2]}}
V = {"b": {"d": X[0].sin(), "c": X[1].sin()}, "a": X[2].sin()}
W = {"a": V["a"], "b": {"c": V["b"]["c"], "d": V["b"]["d"]}}


def weighed(p):
    return {"y": p["a"] * 2 + p["b"]["c"], "x": p["b"]["d"].sin() * 3}


@pytest.mark.parametrize("tree", [dict, OrderedDict])
def test_tangents_and_cotangents_by_key(tree):
    p, v, w = tree(P), tree(V), tree(W)
    assert_same(jvp(weighed, (p,), (v,))[1], jvp(weighed, (p,), (w,))[1])
    assert_same(linearize(weighed, p)[1](v), linearize(weighed, p)[1](w))
    _, pull = vjp(weighed, P)
    assert_same(pull({"x": X[0], "y": X[1]}), pull({"y": X[1], "x": X[0]}))
    nested = lambda p: [weighed(p), (weighed(p),)]
    _, pull = vjp(nested, P)
    one, other = {"x": X[0], "y": X[1]}, {"y": X[1], "x": X[0]}
    assert_same(pull([one, (one,)]), pull([other, (other,)]))


def test_dims_by_key():
    q = {"a": torch.randn(2, 3), "b": torch.randn(3, 2)}
    f = lambda d: {"x": d["a"] * 2, "y": d["b"] * 3}
    want = vmap(f, ({"a": 0, "b": 1},), {"x": 0, "y": 1})(q)
    assert_same(want, {"x": q["a"] * 2, "y": q["b"] * 3})
    assert_same(vmap(f, ({"b": 1, "a": 0},), {"y": 1, "x": 0})(q), want)
    assert_same(
        vmap(lambda p: f(p.left), (Pair({"b": 1, "a": 0}, None),), {"y": 1, "x": 0})(Pair(q, 3)),
        want,
    )
    with pytest.raises(ArgumentError, match="structure"):
        vmap(f, ({"b": 1, "c": 0},))(q)


def test_complex_tangents_of_what_is_real():
    x, t = torch.tensor(1.0), torch.tensor(1 + 2j)
    for run in (
        lambda: jvp(torch.sin, (x,), (t,)),
        lambda: vjp(torch.sin, x)[1](t),
        lambda: linearize(torch.sin, x)[1](t),
    ):
        with pytest.raises(ArgumentError, match=r"complex"):
            run()
    assert_same(jvp(lambda z: z * 2, (t,), (x,))[1], torch.tensor(2 + 0j))


def test_out_dims_of_one_result_may_be_a_tuple():
    x = torch.randn(2, 3)
    for f, dims in ((torch.sin, (1,)), (lambda x: x.unsqueeze(0), (-1,))):
        got, want = (v(f, out_dims=dims)(x) for v in (vmap, torch.func.vmap))
        assert_same(got, want)
    assert_same(vmap(lambda _: x, out_dims=(None,))(x), x)
