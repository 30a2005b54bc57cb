"""Looking inside: the programs of a call in order, and the levels of AOTFUNC_DEBUG."""

import os
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from torch.utils.checkpoint import checkpoint

from aotfunc import (
    aot_function,
    aot_module,
    debug,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jit,
    jvp,
    linearize,
    vmap,
)
from aotfunc.debug import stages
from tests.functions import Cube
from tests.reference import assert_same

X = torch.linspace(-1, 1, 6).view(2, 3)


def f(x):
    return (x.sin() * 2).sum()


def test_of_a_transform():
    assert_expected_inline(
        repr(stages(vmap(grad(f)))(X)).replace("torch.ops.", ""),
        """\
# capture: 3 nodes
def capture(x):
    sin = aten.sin.default(x);  x = None
    mul = aten.mul.Tensor(sin, 2);  sin = None
    sum_1 = aten.sum.default(mul);  mul = None
    return (sum_1,)

# vjp: 3 -> 2 nodes
def vjp(x):
    cos = aten.cos.default(x);  x = None
    mul_1 = aten.mul.Tensor(cos, 2);  cos = None
    return (mul_1,)

# capture: 2 -> 2 nodes
def capture(x):
    cos = aten.cos.default(x);  x = None
    mul = aten.mul.Tensor(cos, 2);  cos = None
    return (mul,)

# vmap: 2 -> 2 nodes
def vmap(x):
    cos = aten.cos.default(x);  x = None
    mul = aten.mul.Tensor(cos, 2);  cos = None
    return (mul,)""",
    )


def made(compiled, x):
    return [(made_by, size) for made_by, _, size, _ in stages(compiled)(x)]


@pytest.mark.eager  # others have stages of their own
def test_of_compiled_functions():
    leaf = X.clone().requires_grad_()
    assert made(jit(f), X) == [("capture", 3)]
    assert made(jit(f), leaf) == [("capture", 3), ("vjp", 7), ("forward", 3), ("backward", 4)]

    def compiler(gm, example_inputs):
        return gm

    called = ("compiled by test_of_compiled_functions.<locals>.compiler", 3)
    assert made(aot_function(f, compiler), X) == [("capture", 3), called]
    names = [name for name, _ in made(aot_module(torch.nn.Linear(3, 3)), X)]
    assert names == ["capture", "vjp", "forward", "backward"]


def test_of_a_function_that_calls_others():
    def program(x):
        return jacrev(jit(f))(x) + hessian(f)(x).sum()

    names = [name for name, *_ in stages(program)(X)]
    assert {"capture", "vjp", "jvp", "vmap", "jacrev", "jacfwd"} <= {*names}


@pytest.mark.parametrize(
    "transform", [grad, jacrev, jacfwd, hessian, lambda f: lambda x: jvp(f, (x,), (x,))]
)
@pytest.mark.parametrize(
    "function", [f, lambda x: (x * X).sum(), lambda x: checkpoint(f, x, use_reentrant=False)]
)
def test_every_program_says_its_pass_and_runs(transform, function):
    call = transform(function)
    found = stages(call)(X)
    for made_by, code, *_ in found:
        assert made_by
        space = {"torch": torch, "device": torch.device}
        exec(code, space)
    space = {"torch": torch, "device": torch.device}
    exec(found[-1].code, space)
    last = space[found[-1].made_by.replace(" ", "_")]
    closed_over = [X] * (last.__code__.co_argcount - 1)
    want = call(X)[0] if isinstance(call(X), tuple) else call(X)
    assert_same(last(X, *closed_over)[0], want)


def test_of_steps_with_programs_of_their_own():
    def program(x):
        return (Cube.apply(x) + jit(torch.sin)(x)).sum()

    names = [name for name, *_ in stages(grad(program))(X)]
    assert all(names) and names[0] == "capture"
    names = [name for name, *_ in stages(lambda x: linearize(program, x)[1](x))(X)]
    assert all(names)


def test_what_was_remembered_is_there_again():
    g, calls = jit(f), []
    g(X)
    assert stages(g)(X) and g.captures == 2
    g(X)
    assert g.captures == 2

    def fails(x):
        calls.append(f(x))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stages(grad(fails))(X)
    assert debug.watched is None
    g(X)
    assert g.captures == 2


def test_stages_inside_stages():
    inner = []
    outer = stages(lambda x: (inner.extend(stages(grad(f))(x)), grad(f)(x)))(X)
    assert [s.made_by for s in inner] == [s.made_by for s in outer] == ["capture", "vjp"]


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_levels(level):
    code = "import torch; from aotfunc import grad; grad(lambda x: x.sin().sum())(torch.ones(2))"
    env = {**os.environ, "AOTFUNC_DEBUG": str(level)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert ("# vjp: 1 nodes\ndef vjp(x):" in done.stderr) == (level >= 3)
    assert ("    cos = f0(x)\n" in done.stderr) == (level >= 4)


def test_the_line_is_found_from_the_offset_of_its_instruction():
    def lines():
        yield debug.user_line()
        yield (
            1,
            debug.user_line(),
        )[1]

    first = lines.__code__.co_firstlineno
    assert [line.number - first for line in lines()] == [1, 4]
    assert debug.Line(lines.__code__, 0).number == first
