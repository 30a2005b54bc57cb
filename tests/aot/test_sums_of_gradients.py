"""Gradients of one value of few digits are added in autograd's order, that of the ops from the
last to the first: every bit is eager's.

It cannot be so everywhere: a compiled call is one node of autograd, so that the gradients of its
input, and of a result that others are computed from, are added inside of it first; a view of all
of a tensor is that tensor. Second derivatives have formulas of their own."""

import random

import pytest
import torch
import torch.nn.functional as F

from aotfunc import aot_function, grad, jit
from tests.reference import BITS

WAYS = {
    "jit": lambda f: jit(f, backend="eager"),
    "aot_function": lambda f: aot_function(f, "eager"),
}
#: of a value with many uses
USES = {
    "products": lambda v: v * 3 + v * 0.7 + v.sin() + v * v + v.cos(),
    "equal ones": lambda v: (v * 0.7).sin() + (v * 0.3) * v + (v * 0.7).cos() * v.tanh(),
    "powers": lambda v: v**3 + v.square() * v + v**5 * 0.1,
    "quotients": lambda v: v / (1 + v.square()) + v / (2 + v.cos()) + 1 / (3 + v),
    "matrices": lambda v: v @ v.t() + v * v @ v + F.linear(v, v.tanh()),
    "views": lambda v: v[0] * v[:, 1] + v[1:].sum(0) * v.t()[2] + v.sum(1),
    "softmax": lambda v: v.softmax(-1) * v + F.layer_norm(v, (3,)) * v.tanh() + v,
    "a copy": lambda v: (lambda c: c * 3 + v * 0.7 + c.sin() + v * v + c.cos())(v.clone()),
    "a copy in place": lambda v: v.clone().add_(v.sin()).mul_(v) + v * 0.3,
    "times one": lambda v: (lambda c: c * 3 + v * 0.7 + c.sin() + v * v + c.cos())(v * 1),
    "laid out anew": lambda v: (lambda c: c * 3 + v * 0.7 + c.sin() + v * v)(v.t().contiguous()),
    "in place": lambda v: (v * 0.7).mul_(v).add_(v.sin()).mul_(v.cos()),
}


def gradient(f, x, dtype):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x.to(dtype) * 1).float().sin().sum(), x)
    return g


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("way", WAYS)
def test_every_bit(way, name, dtype):
    if name == "powers" and not BITS:
        pytest.skip("kernels round a power once, eager each of its products")
    f = USES[name]
    compiled = WAYS[way](lambda x: f(x.to(dtype) * 1).float().sin().sum())
    torch.manual_seed(0)
    for _ in range(8):
        x = torch.randn(3, 3)
        leaf = x.clone().requires_grad_()
        compiled(leaf).backward()
        assert torch.equal(leaf.grad, gradient(f, x, dtype))
        assert torch.equal(grad(lambda x: f(x.to(dtype) * 1).float().sin().sum())(x), leaf.grad)


def test_the_order_shows():
    """The test above would see another order."""
    torch.manual_seed(0)
    parts = torch.randn(64, 4).bfloat16().unbind(1)
    assert not torch.equal(sum(parts), sum(parts[::-1]))


ONE = ["{x}.sin()", "{x}.tanh()", "{x} * 3", "{x} * 0.7", "F.relu({x})", "{x}.square()"]
TWO = ["{x} * {y}", "{x} + {y}", "{x} / (1 + {y}.square())", "torch.where({x} > 0, {x}, {y})"]
SHOWN = ["{x}[1:]", "{x}[0]", "{x}.t()", "{x}[:, 1:]"]


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed):
    draw = random.Random(seed)
    names, lines = ["v"], []
    for i in range(draw.randrange(4, 12)):
        kind = draw.choices([ONE, TWO, SHOWN], [4, 5, 1])[0]
        x, y = draw.choice(names[-3:] + ["v"]), draw.choice(names)
        lines.append(f"    a{i} = {draw.choice(kind).format(x=x, y=y)}\n")
        names += [f"a{i}"] if kind is not SHOWN else []
    text = "def f(v):\n" + "".join(lines) + f"    return {names[-1]}\n"
    scope = {"torch": torch, "F": F}
    exec(text, scope)
    f, x = scope["f"], torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
    leaf = x.clone().requires_grad_()
    WAYS["jit"](lambda x: f(x.bfloat16() * 1).float().sin().sum())(leaf).backward()
    assert torch.equal(leaf.grad, gradient(f, x, torch.bfloat16)), text
