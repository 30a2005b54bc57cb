"""Launches: what kernels write comes back in new tensors, called natively or in Python."""

import contextlib
import gc
import os
import resource
import sys
import threading
import weakref

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from aotfunc import jit
from aotfunc.backends.loops import launch, native
from aotfunc.backends.loops.launch import Launch
from aotfunc.errors import BackendWarning
from aotfunc.native import toolchain

SOURCE = (
    native.PRELUDE
    + """
extern "C" void add(int64_t begin, int64_t end, const int64_t *, void *const *buffers) {
  const float *x = (const float *)buffers[0], *y = (const float *)buffers[1];
  for (int64_t i = begin; i < end; i++) ((float *)buffers[2])[i] = x[i] + y[i];
}
extern "C" void both(int64_t begin, int64_t end, const int64_t *sizes, void *const *buffers) {
  const float *x = (const float *)buffers[2];
  for (int64_t i = begin; i < end; i++) {
    float sum = 0;
    for (int64_t k = 0; k < sizes[0]; k++) sum += x[i * sizes[0] + k];
    ((float *)buffers[1])[i] = sum;
    ((double *)buffers[0])[i] = sizes[1];
  }
}
extern "C" void count(int64_t begin, int64_t end, const int64_t *, void *const *buffers) {
  for (int64_t i = begin; i < end; i++) ((int64_t *)buffers[0])[i] = i;
}
extern "C" void twice(int64_t begin, int64_t end, const int64_t *, void *const *buffers) {
  for (int64_t i = begin; i < end; i++) ((float *)buffers[0])[i] *= 2;
}
extern "C" void wait(int64_t, int64_t, const int64_t *, void *const *buffers) {
  int64_t met = 0;
  for (int64_t n = 0; n < 10'000'000'000 && !met; n++)
    met = __atomic_load_n((int64_t *)buffers[0], __ATOMIC_SEQ_CST);
  *(int64_t *)buffers[1] = met;
}
extern "C" void once(int64_t begin, int64_t end, const int64_t *, void *const *buffers) {
  __atomic_fetch_add((int64_t *)buffers[0], 1, __ATOMIC_SEQ_CST);
}
"""
)


@pytest.fixture(params=["native", "plain"])
def form(request, monkeypatch):
    """Both ways to call a kernel."""
    if request.param == "plain":
        monkeypatch.setattr(launch, "native_form", lambda: None)
    else:
        assert launch.native_form()
    return request.param


def vector(n, dtype=torch.float32):
    return ((n,), (1,), dtype)


def made(name, *args, **options) -> Launch:
    return Launch(native.load_kernels(SOURCE)[name], *args, **options)


def add(n: int) -> Launch:
    return made("add", n, (), [vector(n)], (0, 1, 2))


def test_one_output(form):
    x, y = torch.randn(64), torch.randn(64)
    out = add(64)(x, y)
    assert torch.equal(out, x + y) and type(out) is torch.Tensor and not out.requires_grad
    assert isinstance(add(64).entry, type(len)) == (form == "native")


def test_several_outputs_in_any_order(form):
    x = torch.randn(5, 7)
    f = made("both", 5, (7, 9), [vector(5), ((1, 5), (40, 1), torch.float64)], (2, 1, 0))
    sums, sizes = f(x)
    torch.testing.assert_close(sums, x.sum(1))
    assert torch.equal(sizes, torch.full((1, 5), 9.0, dtype=torch.float64))
    assert sizes.stride() == (40, 1)


def test_no_inputs_and_no_outputs(form):
    assert torch.equal(made("count", 9, (), [vector(9, torch.int64)], (0,))(), torch.arange(9))
    x = torch.ones(3)
    assert made("twice", 3, (), [], (0,))(x) == () and x.tolist() == [2, 2, 2]


def test_an_input_twice(form):
    x = torch.randn(8)
    assert torch.equal(made("add", 8, (), [vector(8)], (0, 0, 1))(x), x + x)


@pytest.mark.parametrize("n", [0, 1, 100_003, 1_000_000])
def test_sizes(form, two_threads, n):
    x, y = torch.randn(n), torch.randn(n)
    assert torch.equal(add(n)(x, y), x + y)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", sorted(launch.DTYPES, key=str), ids=str)
def test_dtypes(dtype):
    """All that PyTorch has, also those that it gives no number to."""
    try:
        expected = torch.empty_strided((2, 2), (1, 2), dtype=dtype)
    except (RuntimeError, TypeError, NotImplementedError):
        pytest.skip("PyTorch makes no such tensor")
    f = made("count", 0, (), [((2, 2), (1, 2), dtype)], (0,))
    out = f()
    assert (out.dtype, out.stride()) == (dtype, expected.stride())


class Named(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("only the memory is read")


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("nothing is dispatched")


def test_any_tensor(form):
    whole = torch.arange(20.0)
    with_grad = torch.ones(8, requires_grad=True)
    several = (whole[3:11], nn.Parameter(whole[:8]), with_grad * 2, whole[:8].as_subclass(Named))
    f = add(8)
    for x in several:
        want = x.detach().numpy() if type(x) is not Named else whole[:8].numpy()
        assert (f(x, whole[4:12]).numpy() == want + whole[4:12].numpy()).all()
        assert (f(whole[4:12], x).numpy() == want + whole[4:12].numpy()).all()


def test_in_inference_mode(form):
    x = torch.ones(4)
    with torch.inference_mode():
        assert add(4)(x, x).is_inference()
    assert not add(4)(x, x).is_inference()


def test_tensors_without_memory(form):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(4))
    wrapped = torch.Tensor._make_wrapper_subclass(Wrapper, (4,))
    elsewhere = torch.ones(4, device="meta")
    for other in (
        fake,
        wrapped,
        elsewhere,
        torch.eye(4).to_sparse(),
        torch._to_functional_tensor(fake),
    ):
        with pytest.raises(TypeError, match=r"input 1, on (cpu|meta), has no CPU memory"):
            add(4)(torch.ones(4), other)


@pytest.mark.parametrize("other", [None, 1.0, [1.0], "x", object(), torch.Tensor, torch.float32])
def test_what_is_no_tensor(form, other):
    f, x = add(4), torch.ones(4)
    for args in ((other, x), (x, other)):
        with pytest.raises(TypeError, match=r"the kernel add takes tensors; input \d is a"):
            f(*args)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_a_wrong_number(form, count):
    f, x = add(4), torch.ones(4)
    for g in (f, f.entry):
        with pytest.raises(TypeError, match=f"the kernel add takes 2 tensors, not {count}"):
            g(*[x] * count)
        with pytest.raises(TypeError):
            g(x, x, grain=3)


def test_more_memory_than_there_is(form):
    f = made("count", 0, (), [((2**50,), (1,), torch.int64), vector(1)], (0, 1))
    with pytest.raises(RuntimeError, match="memory"):
        f()


def test_names_in_graphs(form):
    """A launch is the target of a node."""
    f = add(4)
    for target in (f, f.entry) if form == "native" else (f,):
        graph = fx.Graph()
        graph.output(graph.call_function(target, (graph.placeholder("x"), graph.placeholder("y"))))
        module = fx.GraphModule({}, graph)
        assert "launch_add" in module.code and torch.equal(
            module(*[torch.ones(4)] * 2), torch.full((4,), 2.0)
        )


# ----- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, grain, threads, parts",
    [(4, 1, 2, 2), (4, 4, 2, 1), (4, 2, 1, 1), (1, 1, 2, 1), (4, None, 2, 1), (10**5, None, 2, 2)],
)
def test_parts(form, two_threads, rows, grain, threads, parts):
    torch.set_num_threads(threads)
    counter = torch.zeros(max(rows, 4), dtype=torch.int64)
    made("once", rows, (), [], (0,), grain=grain)(counter)
    assert counter[0] == parts


def test_from_several_threads(form, two_threads):
    small, large, wrong = add(16), add(300_000), []

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        for n, f in ((16, small), (300_000, large)) * 10:
            x, y = torch.randn(2, n, generator=g)
            if not torch.equal(f(x, y), x + y):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_others_run_meanwhile():
    """A large launch holds no lock of Python's: another thread ends its wait."""
    flag = torch.zeros(native.GRAIN, dtype=torch.int64)
    other = threading.Timer(0.05, lambda: flag.fill_(1))
    other.start()
    met = made("wait", 1, (), [vector(1, torch.int64)], (0, 1))(flag)
    other.join()
    assert met.item() == 1


def test_in_a_forked_child(form, two_threads):
    x = torch.randn(300_000)
    f = add(300_000)
    f(x, x)  # the parent's threads run
    pid = os.fork()
    if not pid:
        os._exit(0 if bool((f(x, x).numpy() == x.numpy() * 2).all()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# ----- memory ------------------------------------------------------------------------------------


def test_nothing_is_kept(form):
    f, x, y = add(64), torch.ones(64), torch.ones(64)
    g = made("both", 8, (8, 9), [vector(8), vector(8, torch.float64)], (2, 1, 0))
    counts = [sys.getrefcount(o) for o in (x, y, f, f.entry, f.plain)]
    for _ in range(2):  # the first time memory may grow
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(100_000 if form == "native" else 5_000):
            f(x, y)
            g(x)
            with contextlib.suppress(TypeError):
                f(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1000  # KiB
    assert counts == [sys.getrefcount(o) for o in (x, y, f, f.entry, f.plain)]
    out = f(x, y)
    gone = weakref.ref(out)
    assert sys.getrefcount(out) == 2
    del out
    assert gone() is None


def test_a_launch_goes_at_once(form):
    f = add(4)
    plain = weakref.ref(f.plain)
    run = f.entry
    gc.disable()
    try:
        del f
        assert torch.equal(run(torch.ones(4), torch.ones(4)), torch.full((4,), 2.0))
        del run
        assert plain() is None
    finally:
        gc.enable()


# ----- where the native form is not to be had ----------------------------------------------------

LACKS = {
    "a compiler": lambda m: m.setattr(toolchain, "compile", fails),
    "a function of torch": lambda m: m.setattr(
        launch, "built", lambda source: built(source.replace("aoti_torch_get_numel", "aoti_none"))
    ),
    "THPVariable_Wrap": lambda m: m.setattr(launch, "address", lambda f: f.no_such_function),
    "a known layout": lambda m: m.setattr(launch, "offset_of_tensors", unlike),
    "right results": lambda m: m.setattr(
        launch, "built", lambda source: built(source.replace("[i] = (", "[i] = 1 + ("))
    ),
}
built = native.built


def fails(*paths):
    raise toolchain.CompilerError("there is no compiler")


def unlike():
    raise launch.Unlike("tensors are laid out in another way")


@pytest.mark.parametrize("what", LACKS)
def test_the_plain_form_instead(cache, monkeypatch, what):
    kernel = native.load_kernels(SOURCE)["add"]
    monkeypatch.setattr(
        launch, "native_form", launch.functools.cache(launch.native_form.__wrapped__)
    )
    monkeypatch.setattr(launch, "LEVEL", 1)
    LACKS[what](monkeypatch)
    with pytest.warns(BackendWarning, match="called in Python, not natively"):
        f = Launch(kernel, 4, (), [vector(4)], (0, 1, 2))
    assert f.entry is f.plain
    assert torch.equal(f(torch.ones(4), torch.ones(4)), torch.full((4,), 2.0))


def test_compiled_for_the_first_launch(cache, monkeypatch):
    """And found in the disk cache by the next process."""
    runs, compile = [], toolchain.compile
    monkeypatch.setattr(toolchain, "compile", lambda *paths: (runs.append(1), compile(*paths)))
    fresh = lambda: launch.functools.cache(launch.native_form.__wrapped__)
    kernel = native.load_kernels(SOURCE)["add"]
    assert len(runs) == 1
    for _ in range(2):
        monkeypatch.setattr(launch, "native_form", fresh())
        f = Launch(kernel, 4, (), [vector(4)], (0, 1, 2))
        Launch(kernel, 4, (), [vector(4)], (0, 1, 2))
        assert len(runs) == 2 and f.entry is not f.plain


def test_zeros_without_memory(form):
    zeros = torch._efficientzerotensor((4,))
    assert torch.equal(add(4)(torch.ones(4), zeros), torch.ones(4))


@pytest.mark.parametrize("first", ["fake", "real"])
def test_compiled_functions_of_tensors_without_memory(first):
    """They run op by op; one program serves both."""
    f = jit(lambda x: (x.sin() * 2 + 1, torch.rand(3)), backend="cpp")
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(4, requires_grad=True))
    real = torch.ones(4, requires_grad=True)
    for x in (fake, real) if first == "fake" else (real, fake):
        y, _ = f(x)
        y.sum().backward()
        assert type(y) is type(x.grad) is type(x) and y.shape == x.grad.shape == (4,)
    torch.testing.assert_close(real.grad, 2 * torch.ones(4).cos())
    y, _ = f(torch._efficientzerotensor((4,)))
    assert torch.equal(y, torch.ones(4))
