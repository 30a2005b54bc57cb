"""What the first capture exchanges in torch is in one table, and is put back."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import aotfunc
from aotfunc import grad, jit, restore_torch, vmap
from aotfunc.capture.patches import PATCHES
from aotfunc.errors import CaptureError
from aotfunc.trace.patches import ORIGINALS, Code, Exchange

X = torch.linspace(-1, 1, 3)
COMPARED = """
import types
import torch, torch.utils.checkpoint, torch.nn.utils.rnn
from torch.utils.hooks import BackwardHook


def functions(owner):
    ours = lambda name: "aotfunc" in name or "_torch_" in name
    named = {n: x for n, x in list(vars(owner).items()) if not ours(n)}
    codes = {n: x.__code__ for n, x in named.items() if isinstance(x, types.FunctionType)}
    return named, codes


OWNERS = [torch, torch.Tensor, torch._C, torch._C.TensorBase, torch._VF, torch._utils,
          torch.autograd, torch.autograd.Function, torch.autograd.function._SingleLevelFunction,
          torch.autograd.graph, torch.autograd.graph.saved_tensors_hooks, BackwardHook,
          torch.autograd.forward_ad, torch.autograd.forward_ad._set_fwd_grad_enabled,
          torch.backends.mha, torch.nn.functional, torch.nn.Module, torch.random, torch.utils,
          torch.utils.checkpoint]
import aotfunc
torch.overrides.get_default_nowrap_functions()
before = [functions(x) for x in OWNERS], torch.autograd.Function.apply.__func__.__code__
for _ in range(2):
    aotfunc.grad(lambda x: torch.nn.functional.silu(x).sum())(torch.ones(3))
    aotfunc.jit(torch.sin)(torch.ones(2))
    assert torch.autograd.Function.apply.__func__.__code__ is not before[1]
    aotfunc.restore_torch()
    after = [functions(x) for x in OWNERS], torch.autograd.Function.apply.__func__.__code__
    assert after[1] is before[1]
    for owner, (named, codes), (named_, codes_) in zip(OWNERS, before[0], after[0]):
        for n in {**named, **named_}:
            assert named.get(n) is named_.get(n) and codes.get(n) is codes_.get(n), (owner, n)
"""


def test_what_is_exchanged_during_a_capture_is_what_the_docs_list():
    """docs/semantics.md, "The process"; api/patch.py is a call of the user's."""
    package = Path(aotfunc.__file__).parent
    found = {x.relative_to(package).as_posix(): x.read_text() for x in package.rglob("*.py")}
    listed = {"trace/recording.py": 2, "trace/numbers.py": 1, "runtime/parts.py": 1}
    listed["capture/gathering.py"] = 1
    counts = {name: text.count(" Exchange(") for name, text in found.items()}
    assert {k: n for k, n in counts.items() if n} == {**listed, "api/patch.py": 1}


def test_everything_is_put_back():
    subprocess.run([sys.executable, "-c", COMPARED], check=True)


def test_what_is_captured_afterwards_is_right():
    f = lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0].sum()
    g = jit(f)
    try:
        for _ in range(3):
            leaf = X.clone().requires_grad_()
            torch.testing.assert_close(grad(f)(leaf).detach(), 6 * X)
            torch.testing.assert_close(vmap(grad(f))(X.view(3, 1)).view(3), 6 * X)
            torch.testing.assert_close(torch.autograd.grad(g(leaf), leaf)[0], 6 * X)
            restore_torch()
            restore_torch()
            assert torch.autograd.grad((leaf**2).sum(), leaf)[0].equal(2 * X)
    finally:
        grad(torch.sin)(X[0])


def test_not_inside_of_a_capture():
    def f(x):
        restore_torch()
        return x.sum()

    with pytest.raises(CaptureError, match="call it outside"):
        grad(f)(X)
    torch.testing.assert_close(grad(lambda x: (x * x).sum())(X), 2 * X)


def test_another_thread_installs_again():
    grad(torch.sin)(X[0])
    restore_torch()
    got = []
    thread = threading.Thread(
        target=lambda: got.append(
            grad(lambda x: torch.tensor(x.detach().tolist()).sum() * x)(X[0])
        )
    )
    thread.start()
    thread.join()
    torch.testing.assert_close(got[0], X[0])


def test_each_has_a_name_of_its_own():
    grad(torch.sin)(X[0])
    names = [p.name for p in PATCHES if hasattr(p, "name")]
    assert len(names) == len({*names})
    assert {*names} <= ORIGINALS.keys()
    assert all(
        p.f.__code__ is not ORIGINALS[p.name].__code__ for p in PATCHES if isinstance(p, Code)
    )


IMPORTED = """
import sys, warnings
import torch, aotfunc

def f(x):
    import torch._dynamo
    return x.sin()

assert "torch._dynamo" not in sys.modules
{capture}
warnings.simplefilter("error", UserWarning)
g = lambda x: sum((p * torch.tensor([1.0]) for p in x.tensor_split(2)), torch.asarray([2.0]))
x = torch.ones(2)
assert torch.compile(g, backend="eager", fullgraph=True)(x).equal(g(x))
"""


@pytest.mark.parametrize(
    "capture", ["aotfunc.vmap(f)(torch.ones(3))", "aotfunc.jit(f)(torch.ones(3))"]
)
def test_dynamo_imported_in_a_capture_knows_torchs_functions(capture):
    subprocess.run([sys.executable, "-c", IMPORTED.format(capture=capture)], check=True)


@pytest.mark.parametrize("interrupted", range(4))
def test_an_interrupted_exchange_is_undone(interrupted: int) -> None:
    """Ctrl-C between any two attributes, of exchanging or of putting back."""
    sets = iter(range(10))

    class Interrupts(type):
        def __setattr__(cls, name: str, value: object) -> None:
            if next(sets) == interrupted:
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    class Owner(metaclass=Interrupts):
        a, b = len, max

    exchange = Exchange({(Owner, "a"): abs, (Owner, "b"): min})
    with pytest.raises(KeyboardInterrupt), exchange:
        assert (Owner.a, Owner.b) == (abs, min)
    assert (Owner.a, Owner.b, exchange.count, exchange.done) == (len, max, 0, False)
    with exchange:
        assert (Owner.a, Owner.b) == (abs, min)
    assert (Owner.a, Owner.b) == (len, max)
