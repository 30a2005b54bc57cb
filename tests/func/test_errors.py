"""What errors say: the argument by name, the user's line, the way out; and short tracebacks."""

import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from aotfunc import grad, hessian, jacfwd, jacrev, jit, jvp, linearize, make_fx, vjp, vmap
from aotfunc.errors import AotfuncError, ArgumentError, OpError

x, y = torch.randn(3, 4), torch.randn(5, 2)


def predict(weights, batch):
    return (batch["x"] @ weights["w"]).sum()


def nothing(a):
    a.sin()


PLAIN = "(float32[4], {'x': float32[3, 4]})"
ARGUMENTS = {
    "in_dims of another structure": (
        lambda: vmap(lambda w, b: (b["x"] @ w).sum(), (None, {"y": 0}))(x[0], {"x": x}),
        "vmap: in_dims=(None, {'y': 0}) does not have the structure of the arguments, " + PLAIN,
    ),
    "sizes": (
        lambda: vmap(predict)({"w": x}, {"x": y}),
        "weights['w'] (argument 0) has 3 at dimension 0; batch['x'] (argument 1) has 5 at "
        "dimension 0",
    ),
    "no such dimension": (
        lambda: vmap(predict, in_dims=({"w": 0}, {"x": 3}))({"w": x}, {"x": y}),
        "in_dims has 3 for batch['x'] (argument 1), which has 2 dimensions",
    ),
    "no tensor": (
        lambda: vmap(lambda a, k: a * k)(x, 2),
        "in_dims has 0 for k (argument 1), which is of type int",
    ),
    "variadic": (
        lambda: vmap(lambda *xs: xs[0])(x, y),
        "xs[0] (argument 0) has 3 at dimension 0; xs[1] (argument 1)",
    ),
    "no signature": (
        lambda: vmap(torch.dot)(x, y),
        "argument 0 has 3 at dimension 0; argument 1 has 5",
    ),
    "integers": (
        lambda: grad(predict, 1)({"w": x}, {"x": x.long()}),
        "grad: batch['x'] (argument 1) has dtype",
    ),
    "complex": (lambda: jacrev(torch.sin)(x.to(torch.complex64)), "jacrev: argument 0 is complex"),
    "tangent": (
        lambda: jvp(predict, ({"w": x}, {"x": y}), ({"w": x}, {"x": x})),
        "the tangent of batch['x'] (argument 1) must have its primal's shape [5, 2], not [3, 4]",
    ),
    "tangents": (
        lambda: jvp(predict, ({"w": x},), ({"v": x},)),
        "primals are ({'w': float32[3, 4]},), tangents ({'v': float32[3, 4]},)",
    ),
    "out_dims": (
        lambda: vmap(lambda a: {"a": a}, out_dims=(0, 0))(x),
        "out_dims=(0, 0) does not have the structure of the results, {'a': float32[4]}",
    ),
    "result in a tree": (
        lambda: vjp(lambda a: {"a": a, "n": 2}, x),
        "vjp: the output['n'] is of type int",
    ),
    "has_aux": (
        lambda: grad(lambda a: a.sum(), has_aux=True)(x),
        "must return (output, aux), not float32[]",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_error_names_it(case):
    call, text = ARGUMENTS[case]
    with pytest.raises(ArgumentError) as caught:
        call()
    assert text in str(caught.value)


TRANSFORMS = {
    "grad": lambda f: grad(f)(x),
    "vjp": lambda f: vjp(f, x),
    "jvp": lambda f: jvp(f, (x,), (x,)),
    "linearize": lambda f: linearize(f, x),
    "jacrev": lambda f: jacrev(f)(x),
    "jacfwd": lambda f: jacfwd(f)(x),
    "vmap": lambda f: vmap(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_forgotten_return(transform):
    with pytest.raises(
        ArgumentError,
        match=r"nothing \(test_errors.py:\d+\) returned None: is a `return` missing\?",
    ):
        TRANSFORMS[transform](nothing)


def product(a):
    return a @ y


CALLS = {
    **TRANSFORMS,
    "hessian": lambda f: hessian(f)(x),
    "jit": lambda f: jit(f)(x),
    "make_fx": lambda f: make_fx(f)(x),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_refused_op_names_shapes_and_line(call):
    with pytest.raises(
        OpError,
        match=r"aten.mm.default\(float32\[\d, 4\], float32\[5, 2\]\): .*product: return a @ y",
    ):
        CALLS[call](product)


KINDS = {
    "index": (lambda a: a.sum(7), IndexError),
    "index of a view": (lambda a: a.select(0, 9), IndexError),
    "shapes": (product, RuntimeError),
    "conversion": (lambda a: torch.bitwise_and(a, a), RuntimeError),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_op_is_of_eagers_class(kind):
    f, cls = KINDS[kind]
    for call in (lambda: f(x), lambda: jit(f)(x), lambda: vmap(f)(x[None])):
        with pytest.raises(cls):
            call()


REFUSED = {
    "product": lambda x: x @ torch.ones(5, 2),
    "product with a vector": lambda x: x @ torch.ones(5),
    "batched product": lambda x: torch.bmm(x[None], torch.ones(1, 5, 2)),
    "sum": lambda x: x + torch.ones(5),
    "concatenation": lambda x: torch.cat([x, torch.ones(2, 5)]),
    "view": lambda x: x.view(5, 5),
    "transposed view": lambda x: x.t().view(-1),
    "convolution": lambda x: torch.nn.functional.conv1d(x[None], torch.ones(2, 7, 1)),
    "determinant": lambda x: torch.linalg.det(x),
    "dimension": lambda x: x.sum(5),
    "dtype": lambda x: torch.nn.functional.one_hot(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_op_says_what_eager_says(name):
    x = torch.ones(3, 4)
    with pytest.raises(Exception) as eager:
        REFUSED[name](x)
    with pytest.raises(type(eager.value)) as ours:
        grad(lambda x: REFUSED[name](x).sum())(x)
    assert str(eager.value).split("\n")[0].split(' at "')[0] in str(ours.value)


@pytest.mark.parametrize("call", [*CALLS, "vmap(grad)"])
def test_a_traceback_shows_the_users_lines(call):
    nested = {"vmap(grad)": lambda f: vmap(grad(lambda a: f(a).sum()))(x)}

    def loss(a):
        return product(a)

    with pytest.raises(AotfuncError) as caught:
        (CALLS | nested)[call](loss)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [f.name for f in frames][-2:] == ["loss", "product"]
    assert (
        sum("aotfunc" in Path(f.filename).parts[:-1] and "tests" not in f.filename for f in frames)
        <= 2
    )


def test_a_users_own_error_keeps_its_context():
    def f(a):
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904

    with pytest.raises(ValueError, match="second") as caught:
        grad(f)(x)
    assert isinstance(caught.value.__context__, KeyError) and caught.value.__cause__ is None


def test_all_frames_on_request(tmp_path):
    code = "import torch, aotfunc\n"
    code += "aotfunc.grad(lambda a: (a @ torch.ones(5, 2)).sum())(torch.ones(3, 4))\n"
    (tmp_path / "users.py").write_text(code)
    lines = {}
    for switch in ("", "full"):
        env = {
            "AOTFUNC_TRACEBACK": switch,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PATH": "",
        }
        run = subprocess.run(
            [sys.executable, tmp_path / "users.py"], capture_output=True, text=True, env=env
        )
        lines[switch] = run.stderr.count("  File ")
    assert lines[""] <= 4 and lines["full"] > 8
