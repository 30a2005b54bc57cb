"""Sixty and more varied programs: capture equals eager in trees, values, dtypes, strides, writes
and gradients."""

import pytest
import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

import aotfunc
from aotfunc import make_fx
from tests.capture.programs import NO_GRAD, PROGRAMS
from tests.reference import assert_same, differentiable, grads

SEED = 5


def built(name):
    torch.manual_seed(SEED)
    return PROGRAMS[name]()


def again(args):
    """The same inputs with the same requires_grad, without history; strides as they are."""

    def copy(x):
        if not isinstance(x, torch.Tensor):
            return x
        y = (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            if x.numel()
            else torch.empty_like(x)
        )
        y = x.detach() if 0 in x.stride() else y.copy_(x.detach())
        return y.requires_grad_(x.requires_grad)

    return tree_map(copy, args)


def total(f):
    """A scalar of every floating output, each entry with its own weight."""

    def run(*args):
        result = 0.0
        for out in tree_leaves(f(*args)):
            if differentiable(out):
                out = torch.view_as_real(out.resolve_conj()) if out.is_complex() else out
                weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).reshape(
                    out.shape
                )
                result = result + (out.double() * weights).sum()
        return result

    return run


def seeded(f, args):
    torch.manual_seed(SEED)
    return f(*args)


def test_there_are_sixty():
    assert len(PROGRAMS) >= 60


@pytest.mark.parametrize("name", PROGRAMS)
def test_capture_equals_eager(name):
    f, args = built(name)
    mine, theirs = again(args), again(args)
    expected = seeded(f, theirs)
    gm = make_fx(f)(*again(args))
    assert isinstance(gm, fx.GraphModule)
    assert_same(seeded(gm, mine), expected, strides=True)
    assert_same(mine, theirs)  # writes to inputs included


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_graph_runs_on_other_values(name):
    f, args = built(name)
    gm = make_fx(f)(*again(args))
    scaled = lambda: tree_map(
        lambda x: (x * 0.5).detach().requires_grad_(x.requires_grad) if differentiable(x) else x,
        args,
    )
    assert_same(seeded(gm, scaled()), seeded(f, scaled()))


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in NO_GRAD])
def test_gradient_equals_autograd(name):
    f, args = built(name)
    nums = tuple(
        i
        for i, a in enumerate(args)
        if tree_leaves(a) and all(map(differentiable, tree_leaves(a)))
    )
    if not nums:
        return
    expected = seeded(grads(total(f), nums), again(args))
    assert_same(seeded(aotfunc.grad(total(f), argnums=nums), again(args)), expected)


@pytest.mark.parametrize("name", PROGRAMS)
def test_jit_equals_eager(name):
    f, args = built(name)
    jitted = aotfunc.jit(f)
    for _ in range(2):
        mine, theirs = again(args), again(args)
        expected = seeded(f, theirs)
        assert_same(seeded(jitted, mine), expected, strides=True)
        assert_same(mine, theirs)


# the graph itself
# -------------------------------------------------------------------------------------------------


class MetaCheck(fx.Interpreter):
    """Runs a graph and compares every value with what its node's metadata promised."""

    def run_node(self, node):
        out = super().run_node(node)
        if node.op in ("call_function", "placeholder"):
            fake = node.meta.get("val")
            if isinstance(
                out, torch.Tensor
            ):  # of several results, those that are read pass by as getitem nodes
                assert isinstance(fake, torch.Tensor), f"{node.format_node()}: no metadata"
                assert (out.shape, out.dtype) == (fake.shape, fake.dtype), node.format_node()
                assert significant(out) == significant(fake), f"{node.format_node()}: strides"
        return out


def significant(x):
    return [s for s, n in zip(x.stride(), x.shape) if n > 1] if x.numel() else []


@pytest.mark.parametrize("name", PROGRAMS)
def test_metadata_is_what_a_run_produces(name):
    f, args = built(name)
    gm = make_fx(f)(*again(args))
    leaves = [x for x in tree_leaves(again(args))]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if len(placeholders) == len(leaves):
        MetaCheck(gm).run(*leaves, enable_io_processing=False)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_graph_is_functional_and_tidy(name):
    f, args = built(name)
    gm = make_fx(f)(*again(args))
    gm.graph.lint()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            assert node.op in ("placeholder", "get_attr", "output"), node.format_node()
            continue
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            assert target is torch.ops.aten.copy_.default and node.args[0].op in (
                "placeholder",
                "get_attr",
            ), gm.code
        else:
            assert node.users or has_an_effect(target), f"dead: {node.format_node()}"


def has_an_effect(target):
    """Random draws move the generator; an op that returns nothing is there for what it checks."""
    op = isinstance(target, torch._ops.OpOverload)
    return op and (torch.Tag.nondeterministic_seeded in target.tags or not target._schema.returns)
