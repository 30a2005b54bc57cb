"""Captures in several threads, and errors in the middle of a capture, leave the process as it
was."""

import gc
import os
import signal
import threading

import pytest
import torch
from torch import nn
from torch.utils import _python_dispatch

import aotfunc as A
from aotfunc.trace import collector
from aotfunc.trace.traced import under_way
from tests.functions import Cube

in_any_mode = _python_dispatch.is_in_any_mode_without_ignore_compile_internals


def state() -> dict:
    """What a capture changes for a while: switches of the process and of this thread."""
    return {
        "mha fast path": torch.backends.mha.get_fastpath_enabled(),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "garbage collector": gc.isenabled(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "inside a mode": _python_dispatch.is_in_torch_dispatch_mode(),
        "inside a mode, for torch.compile": in_any_mode(),
        "recordings": len(under_way.traces),
        "pauses": len(collector._pauses),
        "functorch": torch._C._functorch.peek_interpreter_stack(),
        "Dynamo": torch._C._dynamo.eval_frame.get_eval_frame_callback(),
        "generator": torch.default_generator.get_state().sum().item(),
    }


def in_threads(count: int, work) -> None:
    """``work(k)`` in threads that start together; the first error is raised here."""
    errors, together = [], threading.Barrier(count)

    def run(k: int) -> None:
        together.wait()
        try:
            work(k)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]


SHARED = A.jit(lambda x, c: Cube.apply(x * c).sum())


def programs(c: float):
    """Functions of a vector, and their right values."""
    return [
        (A.vmap(A.grad(lambda x: (x * x * c).sin())), lambda x: 2 * c * x * (c * x * x).cos()),
        (A.grad(lambda x: Cube.apply(x * c).sum()), lambda x: 3 * c**3 * x * x),
        (A.hessian(lambda x: (x**3).sum() * c), lambda x: torch.diag(6 * c * x)),
        (A.grad(lambda x: SHARED(x, c)), lambda x: 3 * c**3 * x * x),
        (lambda x: A.jvp(A.jit(lambda y: y.exp() * c), (x,), (x,))[1], lambda x: x.exp() * c * x),
        (lambda x: A.make_fx(lambda y: y * c + y)(x)(x), lambda x: x * c + x),
    ]


def test_captures_in_threads():
    before = state()

    def work(k: int) -> None:
        for i in range(12):
            x = torch.linspace(-1, 1, 3 + i % 4, dtype=torch.float64)
            for f, right in programs(1.0 + k + i / 7):
                torch.testing.assert_close(f(x), right(x))

    in_threads(4, work)
    assert state() == before


def test_the_fast_path_of_attention_is_off_in_the_capturing_thread_alone():
    inside, outside = threading.Event(), threading.Event()
    seen = []

    def f(x):
        inside.set()
        outside.wait(10)
        seen.append(torch.backends.mha.get_fastpath_enabled())
        return x.sum()

    thread = threading.Thread(target=lambda: A.grad(f)(torch.ones(2)))
    thread.start()
    inside.wait(10)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # what the user sets meanwhile holds
    outside.set()
    thread.join()
    assert seen == [False] and not torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)


def test_a_redirected_function_can_still_be_scripted_and_compiled():
    A.grad(torch.sum)(torch.ones(2))  # redirects
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.rand(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
        torch.testing.assert_close(
            torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x)
        )
    torch.jit.script(nn.CTCLoss())


def test_the_collector_is_put_back_by_the_last_to_leave():
    # `gc.isenabled()` does not tell of pauses
    first, second = collector.paused_gc(), collector.paused_gc()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not collector._enabled() and collector.isenabled()
    second.__exit__(None, None, None)
    assert collector._enabled()
    gc.disable()
    try:
        with collector.paused_gc():
            pass
        assert not collector._enabled()
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_collects_garbage():
    """Although another thread of its parent was in the middle of a capture."""
    inside, outside = threading.Event(), threading.Event()

    def f(x):
        inside.set()
        outside.wait(10)
        return x.sum()

    thread = threading.Thread(target=lambda: A.grad(f)(torch.ones(2)))
    thread.start()
    inside.wait(10)
    pid = os.fork()
    if not pid:
        os._exit(0 if gc.isenabled() and not collector._pauses else 1)
    outside.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and gc.isenabled()


# ----- errors ------------------------------------------------------------------------------------

ERRORS = [
    ValueError,
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    StopIteration,
    RuntimeError,
    MemoryError,
]

WRAPPERS = {
    "grad": A.grad,
    "vjp": lambda f: lambda x: A.vjp(f, x),
    "jvp": lambda f: lambda x: A.jvp(f, (x,), (x,)),
    "linearize": lambda f: lambda x: A.linearize(f, x),
    "vmap": A.vmap,
    "hessian": A.hessian,
    "functionalize": A.functionalize,
    "make_fx": A.make_fx,
    "jit": A.jit,
    "aot_function": lambda f: A.aot_function(f, "eager"),
    "nested": lambda f: A.vmap(A.grad(lambda x: A.jit(lambda y: f(y).sum())(x))),
    "under functorch": lambda f: torch.func.vmap(A.grad(lambda x: f(x).sum())),
    "in a derivative": lambda f: A.grad(lambda x: Raises.apply(x, f).sum()),
}


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f):
        return f(x) * 1

    @staticmethod
    def backward(ctx, g):
        raise ValueError("never asked for")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_the_middle_of_a_capture(error, wrapper):
    def f(x):
        y = x.sin()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            torch.rand(3)
            raise error("in the middle")
        return y

    before, seed = state(), torch.get_rng_state()
    if wrapper in ("jit", "aot_function") and issubclass(error, Exception):
        torch.rand(3)  # what the function did before its error is done
        before["generator"] = state()["generator"]
        torch.set_rng_state(seed)
    with pytest.raises((error, RuntimeError) if error is StopIteration else error):
        WRAPPERS[wrapper](f)(torch.ones(2, 2))
    assert state() == before


@pytest.mark.skipif(
    "AOTFUNC_FUZZ" not in os.environ,
    reason="moments at random, where torch's own switches may be hit, too",
)
@pytest.mark.parametrize("wrapper", ["grad", "vmap", "make_fx", "jit"])
def test_an_interrupt_at_any_moment(wrapper):
    """Ctrl-C, wherever it hits: what was switched off is on again."""
    before = state()

    def interrupt(*_):
        raise KeyboardInterrupt

    def f(x):
        for _ in range(20):
            x = (x * x).sin()
        return x.sum()

    kept = signal.signal(signal.SIGALRM, interrupt)
    hits = 0
    try:
        for i in range(60):
            call = WRAPPERS[wrapper](lambda x, i=i: f(x) * i)  # a new program each time
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + i * 1e-4)
                call(torch.ones(2, 2))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                hits += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
    assert hits and state() == before


def test_generators_and_coroutines():
    """A generator that is left in the middle of a recorded function, and one that makes captures
    as it goes."""

    def rows(x):
        with torch.no_grad():
            yield from x

    x = torch.rand(3, 2)
    before = state()
    torch.testing.assert_close(A.grad(lambda x: (x * next(rows(x))).sum())(x), x[:1].expand(3, 2))

    def gradients(count):
        for k in range(count):
            yield A.grad(lambda x, k=k: (x**k).sum())(x)

    first, second = gradients(4), gradients(4)
    for k in range(4):
        expected = k * x ** (k - 1) if k else torch.zeros_like(x)
        torch.testing.assert_close(next(first), expected)
        torch.testing.assert_close(next(second), expected)
    assert state() == before
