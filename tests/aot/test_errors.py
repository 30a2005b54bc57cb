"""What compiled functions refuse, and what they say then."""

import importlib
import os
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import aotfunc
from aotfunc import aot_function, jit
from aotfunc.backends import REGISTRY, register
from aotfunc.compile import nop
from aotfunc.errors import AotfuncError, ArgumentError, BackendError, CaptureError

X = torch.randn(3)


def asks_if(x):
    if x.sum() > 0:  # asked here
        return x
    return -x


def asks_item(x):
    return x * x.sum().item()  # asked here


def asks_python(x):
    return x * float(x.max())  # asked here


@pytest.mark.parametrize("f", [asks_if, asks_item, asks_python])
@pytest.mark.parametrize(
    "compiled", [jit, lambda f: aot_function(f, "eager")], ids=["jit", "aot_function"]
)
def test_values_are_not_to_be_had(f, compiled):
    with pytest.raises(CaptureError, match=r"test_errors.py:\d+ in asks_.*# asked here") as e:
        compiled(f)(X)
    assert "torch.where" in str(e.value) or "Python argument" in str(e.value)


class Unhashable:
    __hash__ = None


@pytest.mark.parametrize(
    "call", [lambda f, u: f(X, u), lambda f, u: f(X, option=u), lambda f, u: f(X, [1, u])]
)
def test_unhashable_argument(call):
    f = jit(lambda x, option: x, static_argnums=1)
    with pytest.raises(
        ArgumentError, match=r"argument option.* nor hashable .*test_errors.py:\d+"
    ):
        call(f, Unhashable())


def test_static_arguments():
    f = aot_function(lambda x, dim, keep: x.sum(dim, keep), "eager", static_argnums=(1, 2))
    x = torch.randn(2, 3)
    for dim in (0, 1, (0, 1)):
        torch.testing.assert_close(f(x, dim, True), x.sum(dim, True))


def test_unknown_backend():
    for make in (lambda: jit(torch.sin, backend="nope"), lambda: aot_function(torch.sin, "nope")):
        with pytest.raises(BackendError, match=r"no backend 'nope'; known are .*eager.*inductor"):
            make()
    with pytest.raises(BackendError, match="nope"):
        aot_function(torch.sin, "eager", "nope")


def test_backends_by_name():
    register("mine", nop)
    try:
        x = torch.randn(3, requires_grad=True)
        for f in (
            jit(torch.sin, "mine"),
            aot_function(torch.sin, "mine", "eager"),
            aot_function(torch.sin, nop, "mine"),
        ):
            (g,) = torch.autograd.grad(f(x).sum(), x)
            torch.testing.assert_close(g, x.detach().cos())
        net = aotfunc.aot_module(torch.nn.Linear(3, 3), "mine")
        net(x).sum().backward()
    finally:
        del REGISTRY["mine"]


def test_inductor_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BackendError, match="install g\\+\\+"):
        jit(torch.sin, "inductor")(X)


def test_unknown_option():
    with pytest.raises(ArgumentError, match="partiton_fn"):
        aot_function(torch.sin, "eager", partiton_fn=None)
    aot_function(torch.sin, "eager", num_params_buffers=0, dynamic=False)


def test_backend_is_a_name_of_the_forward_compiler():
    for options in {"backend": "eager"}, {"fw_compiler": "eager"}:
        assert torch.equal(aot_function(torch.sin, **options)(X), X.sin())
    with pytest.raises(ArgumentError, match="two names of one option"):
        aot_function(torch.sin, "eager", backend="cpp")


def warned(f, calls):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for args in calls:
            f(*args)
    return [str(w.message) for w in seen]


def test_warning_names_the_argument_that_keeps_changing():
    (text,) = warned(jit(lambda x, lr: x**lr), [(X, 0.1 * i) for i in range(80)])
    assert "64 times" in text and "Python argument lr" in text and "pass it as a tensor" in text
    assert "test_errors.py" in text
    (text,) = warned(jit(lambda p, x: x ** p["rate"]), [({"rate": 0.1 * i}, X) for i in range(70)])
    assert "p_rate" in text
    (text,) = warned(jit(lambda x, y: x.sum() * y), [(torch.ones(i + 1), X) for i in range(70)])
    assert "shape" in text and " x " in text and " y " not in text
    k = 0
    f = jit(lambda x: x**k)

    def calls():
        nonlocal k
        for k in range(70):  # noqa: B007
            yield (X,)

    (text,) = warned(f, calls())
    assert "closes over" in text
    assert not warned(jit(lambda x, n: x**n), [(X, i % 3) for i in range(80)])
    assert not warned(
        jit(lambda x, lr: x * lr), [(X, 0.1 * i) for i in range(80)]
    )  # an input of its program


def test_the_number_of_entries_is_bounded(monkeypatch):
    monkeypatch.setattr("aotfunc.runtime.compiled.LIMIT", 32)
    f = jit(lambda x, n: x * n if n >= 0 else x)  # each number has an entry of its own
    for n in range(100):
        torch.testing.assert_close(f(X, n), X * n)
        f(X, 0)
        assert len(f.entries) <= 32
    assert (
        len(f.entries) >= 16 and f.captures == 100
    )  # the entry that is used again and again stays


def test_errors_of_the_function_itself_pass():
    def f(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jit(f)(X)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        jit(lambda x: x @ torch.ones(5))(X)
    torch.testing.assert_close(jit(torch.sin)(X), X.sin())  # and nothing is left broken


OUTSIDE = torch.ones(3)


def shown_by_another(out, x):
    first = out[:1]
    torch.sin(x, out=out)
    return first


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.sin(x.sum(), out=x.view_as(x)),
        lambda x: torch.sin(x.clone(), out=OUTSIDE[:1]),
        lambda x: torch.sin(x, out=OUTSIDE),
        lambda x: torch.sort(x, out=(torch.empty(0), OUTSIDE.long()[:1]))[0],
        lambda x: shown_by_another(torch.empty(1), x),
    ],
)
def test_out_of_another_shape(f):
    """Eager mode resizes what is passed as ``out=``, a view away from the memory of its base."""
    x = torch.ones(2, 3)
    with pytest.raises(
        CaptureError,
        match=r"out= has the shape \[.*test_errors.py:\d+.*pass a tensor of the result's",
    ):
        jit(f)(x)
    assert x.tolist() == [[1, 1, 1]] * 2 and OUTSIDE.tolist() == [1, 1, 1]


def test_leaked_value():
    """One in a set; in a list it is a real tensor, added at each call."""
    kept = set()
    jit(lambda x: (kept.add(x * 2), x)[1])(X)
    with pytest.raises((AotfuncError, RuntimeError)):
        kept.pop() + 1


def test_a_graph_on_which_a_compiler_fails_is_kept_as_a_script(tmp_path, monkeypatch):
    (tmp_path / "brittle.py").write_text(
        "def compiler(gm, example_inputs):\n"
        "    assert 'aten.tanh.default' not in gm.code, 'no tanh'\n"
        "    return gm\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    w, index = torch.randn(3, 3), torch.tensor([2, 0])
    f = jit(lambda x: (x.t() @ w).tanh()[index].exp(), importlib.import_module("brittle").compiler)
    with pytest.raises(BackendError, match=r"kept as a script in .*py\n") as caught:
        f(torch.randn(3, 3))
    script = re.search(r"script in (.*)\n", str(caught.value))[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = partial(subprocess.run, capture_output=True, text=True, env=env)
    assert run([sys.executable, script]).stderr.endswith("AssertionError: no tanh\n")
    [line] = re.findall(".* = .*", run([sys.executable, script, "minify"]).stdout)
    assert "torch.ops.aten.tanh.default(" in line


def test_the_script_says_where_a_compiler_without_a_name_goes():
    def compiler(gm, example_inputs):
        raise LookupError

    with pytest.raises(BackendError) as caught:
        jit(torch.sin, compiler)(torch.ones(2))
    script = Path(re.search(r"script in (.*)\n", str(caught.value))[1]).read_text()
    compile(script, "script", "exec")
    assert "compiler here, which has no name to import" in script


WRONG = {
    "fewer": lambda outs: outs[:-1],
    "more": lambda outs: (*outs, outs[0]),
    "None": lambda outs: (*outs[:-1], None),
    "nothing": lambda outs: None,
}


@pytest.mark.parametrize("half", ["forward", "backward", "inference"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_of_a_compiler(wrong, half):
    def compiler(gm, examples):
        return lambda *args: WRONG[wrong](gm(*args))

    ways = {"fw_compiler": "eager", "bw_compiler": "eager"}
    ways["bw_compiler" if half == "backward" else "fw_compiler"] = compiler
    f = aot_function(lambda x, y: (x.sin() * y, x.cos()), **ways)
    given = [X.clone().requires_grad_(half != "inference") for _ in range(2)]
    with pytest.raises(BackendError, match=r"the code of .* returned"):
        first, second = f(*given)
        (first + second).sum().backward()
