"""Capture and the state around it: closed-over tensors, batch norm, autocast, modes, keys, caches,
names."""

import gc
import math
import re
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

import aotfunc
from aotfunc import grad, jit, make_fx, vmap
from aotfunc.errors import AotfuncError, ArgumentError
from tests.inputs import f32, f64
from tests.reference import assert_same, grads

# closed-over tensors are by reference
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["grad", "make_fx", "jit"])
def test_an_optimizer_step_is_seen(transform):
    net, x = nn.Linear(3, 1).double(), f64(4, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    f = lambda x: net(x).square().sum()
    run = {"grad": grad(f), "jit": jit(grad(f)), "make_fx": make_fx(grad(f))(x)}[transform]
    for _ in range(3):
        assert_same(run(x), grads(f)(x))
        opt.zero_grad()
        f(x).backward()
        opt.step()


def test_closed_over_tensors_that_share_storage():
    w = f64(3)
    view = w.view(-1)

    def f(x):
        w.add_(x)
        return (view * x).sum()

    mine, x = w.clone(), f64(3)
    out, expected_w = None, mine + x
    out = vmap(lambda x: x * 1)(x)  # warm
    value = aotfunc.grad_and_value(f)(x)[1]
    assert_same(value, (expected_w * x).sum())
    assert_same(w, expected_w)
    assert_same(out, x)


def test_inputs_that_share_storage():
    def f(x, y):
        x.add_(1)
        return y * 2

    base = f64(6)
    mine, theirs = base.clone(), base.clone()
    expected = f(theirs[:4], theirs[2:])
    try:
        out = jit(f)(mine[:4], mine[2:])
    except AotfuncError:
        return
    assert_same(out, expected)
    assert_same(mine, theirs)


def test_the_same_tensor_as_input_and_closure():
    w = f64(3)
    x = w
    assert_same(grad(lambda x: (x * w).sum())(x), w.clone())  # the closure is a constant


def test_a_parameter_rebound_between_calls():
    net, x = nn.Linear(2, 1).double(), f64(3, 2)
    f = grad(lambda x: net(x).sum())
    assert_same(f(x), net.weight.detach().expand(3, 2).clone())
    net.weight = nn.Parameter(f64(1, 2))
    assert_same(f(x), net.weight.detach().expand(3, 2).clone())


def test_grad_does_not_differentiate_closed_over_parameters():
    w = nn.Parameter(f64(3))
    g = grad(lambda x: (w * x).sum())(f64(3))
    assert w.grad is None and g.requires_grad


def test_captured_graphs_do_not_keep_inputs_alive():
    x = f64(1000)
    ref = weakref.ref(x)
    g = grad(lambda x: x.sin().sum())(x)
    del x
    gc.collect()
    assert ref() is None and g.shape == (1000,)


# batch norm
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm1d(3), lambda: nn.BatchNorm1d(3, momentum=None, affine=False)]
)
def test_batch_norm_statistics_move_once_per_call(make):
    mine, theirs, x = make().double(), make().double(), f64(5, 3)
    f = lambda x: (mine(x) * torch.arange(3.0, dtype=x.dtype)).square().sum()
    g = lambda x: (theirs(x) * torch.arange(3.0, dtype=x.dtype)).square().sum()
    for _ in range(2):
        assert_same(grad(f)(x), grads(g)(x))
        assert_same(dict(mine.state_dict()), dict(theirs.state_dict()))


def test_batch_norm_in_a_captured_graph_and_jit():
    mine, theirs, x = nn.BatchNorm2d(2).double(), nn.BatchNorm2d(2).double(), f64(3, 2, 4, 4)
    gm = make_fx(mine)(x)
    assert_same(dict(mine.state_dict()), dict(theirs.state_dict()))  # capturing moved nothing
    jitted = jit(mine)
    for run in (gm, jitted, jitted):
        assert_same(run(x), theirs(x))
        assert_same(dict(mine.state_dict()), dict(theirs.state_dict()))


def test_batch_norm_module_mode_is_a_guard():
    net, x = nn.BatchNorm1d(3).double(), f64(5, 3)
    f = jit(lambda x: net(x))
    trained = f(x)
    net.eval()
    assert_same(f(x), net(x))
    assert not torch.allclose(f(x), trained)


# modes around and inside
# ---------------------------------------------------------------------------------------------


def test_autocast_leaves_no_traced_values_behind():
    w = f32(3, 3).requires_grad_()
    x = f32(2, 3)
    f = lambda x: (x @ w).float().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.mm(x, w)
        g = grad(f)(x)
        after = torch.mm(x, w)
    assert type(after) is torch.Tensor
    assert_same(after, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(g, grads(f)(x))


def test_autocast_is_part_of_every_key():
    x, w = f32(2, 3), f32(3, 3)
    f = jit(torch.mm)
    assert f(x, w).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert f(x, w).dtype == torch.bfloat16
        assert vmap(torch.matmul, (0, None))(x, w).dtype == torch.bfloat16
    assert f(x, w).dtype == torch.float32


def test_autocast_inside_f():
    def f(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
        assert y.dtype == torch.bfloat16
        return y.float().square().sum()

    x, w = f32(2, 3), f32(3, 3)
    assert_same(grad(f, (0, 1))(x, w), grads(f, (0, 1))(x, w))


def test_fast_paths_are_off_inside_and_on_again_after():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = f32(2, 3, 8)
    before = torch.backends.mha.get_fastpath_enabled()
    f = lambda x: layer(x).square().sum()
    with torch.no_grad():
        g = grad(f)(x)
    assert_same(g, grads(f)(x))
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_default_dtype_inside_f():
    x = f32(3)
    f = lambda x: (x * torch.ones(3)).sum()
    assert_same(grad(f)(x), torch.ones(3))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.ones(3).dtype == torch.float64
        assert make_fx(lambda x: torch.ones(3))(x)(x).dtype == torch.float64
        assert_same(
            grad(lambda x: (x * torch.ones(3)).sum().float())(x),
            torch.ones(3, dtype=torch.float32),
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device_context():
    def f(x):
        with torch.device("cpu"):
            return (x * torch.ones(3, dtype=x.dtype)).sum()

    x = f64(3)
    assert_same(grad(f)(x), torch.ones_like(x))
    with torch.device("meta"):
        out = make_fx(lambda x: torch.zeros(2))(x)(x)
    assert out.device.type == "meta"


def test_a_user_dispatch_mode_around_sees_only_real_tensors():
    from torch.utils._python_dispatch import TorchDispatchMode

    kinds = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kinds.update(type(a) for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    x = f64(3)
    with Watch():
        try:
            g = grad(lambda x: x.sin().sum())(x)
        except AotfuncError:
            return
    assert_same(g, x.cos())


def test_reentrant_capture():
    """A transform called while another capture is going on, on values that are not part of it."""
    w = f64(3)

    def f(x):
        scale = grad(lambda y: (y**2).sum())(w)  # concrete inside a capture
        return (x * scale).sum()

    x = f64(3)
    assert_same(grad(f)(x), 2 * w)
    assert_same(make_fx(f)(x)(x), (x * 2 * w).sum())


# literals made inside
# ------------------------------------------------------------------------------------------------


def test_lift_fresh_constants_are_fresh():
    def f(x):
        buffer = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        buffer.mul_(x)
        return buffer

    x = f64(3)
    gm = make_fx(f)(x)
    for _ in range(3):
        assert_same(gm(x), f(x))


def test_tensor_from_python_is_not_by_reference_but_a_list_value_is_read_each_time():
    values = [1.0, 2.0]
    f = grad(lambda x: (x * torch.tensor(values, dtype=torch.float64)).sum())
    x = f64(2)
    assert_same(f(x), torch.tensor([1.0, 2.0], dtype=torch.float64))
    values[0] = 5.0
    assert_same(f(x), torch.tensor([5.0, 2.0], dtype=torch.float64))


def test_from_numpy_closed_over():
    import numpy as np

    array = np.array([1.0, 2.0, 3.0])
    shared = torch.from_numpy(array)
    f = grad(lambda x: (x * shared).sum())
    assert_same(f(f64(3)), shared.clone())
    array[0] = 7.0
    assert f(f64(3))[0] == 7.0


# make_fx's own contract
# ----------------------------------------------------------------------------------------------


def test_placeholders_are_named_after_the_parameters():
    gm = make_fx(lambda weight, bias: weight * bias)(f64(3), f64(3))
    names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    assert all(name.startswith(want) for name, want in zip(names, ("weight", "bias"))), names


def test_an_input_write_ends_in_copy_():
    def f(x):
        x.add_(1)
        return x * 2

    gm = make_fx(f)(f64(3))
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.aten.copy_.default) == 1
    assert not any(str(t).startswith("aten.add_.") for t in targets)


def test_the_code_says_what_runs():
    gm = make_fx(lambda x: torch.sin(x) * 2)(f64(3))
    assert "torch.ops.aten.sin" in gm.code and "torch.ops.aten.mul" in gm.code
    assert "detach" not in gm.code and "lift_fresh" not in gm.code


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_tracing_modes_are_accepted(tracing_mode):
    x = f64(3)
    gm = make_fx(torch.sin, tracing_mode=tracing_mode)(x)
    assert_same(gm(x), x.sin())


def test_symbolic_sizes_are_refused():
    with pytest.raises(ArgumentError, match="tracing_mode='symbolic' is not supported"):
        make_fx(torch.sin, tracing_mode="symbolic")


OTHERS = {
    "shape": ((f64(4), 2), "x = float64[3] on cpu, not float64[4] on cpu"),
    "dtype": ((f64(3).float(), 2), "x = float64[3] on cpu, not float32[3] on cpu"),
    "device": ((f64(3).to("meta"), 2), "x = float64[3] on cpu, not float64[3] on meta"),
    "number": ((f64(3), 3), "k = 2, not 3"),
    "kind of number": ((f64(3), 2.0), "k = 2, not 2.0"),
}


@pytest.mark.parametrize("copied", ["made", "deepcopy", "pickle"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_module_refuses_what_it_was_not_made_for(other, copied):
    import copy
    import pickle

    gm = make_fx(lambda x, k: (x * k).mean())(f64(3), 2)
    gm = {
        "made": lambda: gm,
        "deepcopy": lambda: copy.deepcopy(gm),
        "pickle": lambda: pickle.loads(pickle.dumps(gm)),
    }[copied]()
    arguments, said = OTHERS[other]
    with pytest.raises(ArgumentError, match=re.escape(f"the module was made for {said}")):
        gm(*arguments)


def test_a_module_that_takes_what_it_is_given():
    gm = make_fx(lambda x: x * 2, check_inputs=False)(f64(3))
    assert gm(torch.ones(4)).tolist() == [2.0] * 4


def test_a_module_made_for_a_tree():
    gm = make_fx(lambda d, p: d["a"] * p[0] + p[1])({"a": f64(3)}, (f64(3), math.nan))
    assert gm({"a": f64(3)}, (f64(3), math.nan)).isnan().all()
    with pytest.raises(ArgumentError, match=r"p \(leaf 1\) = nan, not 1.0"):
        gm({"a": f64(3)}, (f64(3), 1.0))


def test_a_decomposition_table_is_used():
    table = torch._decomp.get_decompositions([torch.ops.aten.silu])
    x = f64(3)
    gm = make_fx(torch.nn.functional.silu, decomposition_table=table)(x)
    assert "aten.silu" not in gm.code
    assert_same(gm(x), torch.nn.functional.silu(x))


def test_a_graph_can_be_captured_again():
    x = f64(3)
    once = make_fx(grad(lambda x: (x.sin() * x).sum()))(x)
    twice = make_fx(once)(x)
    assert_same(twice(x), once(x))
    assert [n.target for n in once.graph.nodes if n.op == "call_function"] == [
        n.target for n in twice.graph.nodes if n.op == "call_function"
    ]


def test_a_graph_survives_deepcopy_and_pickle():
    import copy
    import pickle

    x = f64(3)
    gm = make_fx(lambda x: (x.sin() * 2, {"a": x}))(x)
    assert_same(copy.deepcopy(gm)(x), gm(x))
    assert_same(pickle.loads(pickle.dumps(gm))(x), gm(x))


def test_metadata_is_of_one_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensor

    gm = make_fx(lambda x, y: (x @ y).sin())(f64(2, 3), f64(3, 2))
    values = [n.meta["val"] for n in gm.graph.nodes if n.op != "output"]
    assert all(isinstance(v, FakeTensor) for v in values)
    assert len({id(v.fake_mode) for v in values}) == 1


def test_modules_and_functional_call():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double(), f64(2, 3)
    params = {k: v.detach() for k, v in net.named_parameters()}
    gm = make_fx(lambda p, x: functional_call(net, p, (x,)))(params, x)
    doubled = {k: 2 * v for k, v in params.items()}
    assert_same(gm(doubled, x), functional_call(net, doubled, (x,)))
    assert_same(make_fx(net)(x)(x), net(x))


def test_the_random_state_and_grad_mode_are_as_before():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    make_fx(lambda x: torch.nn.functional.dropout(x, 0.5) * torch.rand(3))(f64(3) * 0)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


# writes that PyTorch itself refuses
# -----------------------------------------------------------------------------------


def test_a_write_to_a_stride_zero_view_is_refused():
    def f(x):
        y = x.expand(4, 3)
        y.add_(1)
        return y

    with pytest.raises(RuntimeError):
        make_fx(f)(f64(3))


def test_caches_are_bounded():
    """Many signatures do not grow memory without limit: graphs of dead functions go away."""
    refs = []
    for n in range(20):
        x = f64(n + 1)
        w = f64(n + 1)
        refs.append(weakref.ref(w))
        grad(lambda x, w=w: (x * w).sum())(x)
        del w
    gc.collect()
    assert sum(ref() is not None for ref in refs) <= 1
