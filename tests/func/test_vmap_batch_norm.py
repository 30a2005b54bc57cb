"""Batch norm under vmap: whose running statistics are updated, in training and evaluation; against
a Python loop."""

import pytest
import torch
import torch.nn.functional as F

from aotfunc import functional_call, grad, jit, replace_all_batch_norm_modules_, vmap
from aotfunc.errors import AotfuncError
from tests.inputs import f64
from tests.reference import assert_same, grads, loop

B, N, C = 3, 5, 2
aten = torch.ops.aten


def statistics(*lead):
    return f64(*lead, C), f64(*lead, C).exp()


def train(x, mean, var, weight=None, bias=None):
    return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3)


OPS = {
    "batch_norm": train,
    "native_batch_norm": lambda x, m, v, w, b: tuple(
        aten.native_batch_norm(x, w, b, m, v, True, 0.3, 1e-5)
    ),
    "legit": lambda x, m, v, w, b: tuple(
        aten._native_batch_norm_legit(x, w, b, m, v, True, 0.3, 1e-5)
    ),
    "with update": lambda x, m, v, w, b: tuple(
        aten._batch_norm_with_update(x, w, b, m, v, 0.3, 1e-5)
    )[:3],
    "in evaluation": lambda x, m, v, w, b: tuple(
        aten.native_batch_norm(x, w, b, m, v, False, 0.3, 1e-5)
    ),
    "legit in evaluation": lambda x, m, v, w, b: tuple(
        aten._native_batch_norm_legit(x, w, b, m, v, False, 0.3, 1e-5)
    ),
    "no update": lambda x, m, v, w, b: tuple(aten._batch_norm_no_update(x, w, b, m, v, 0.3, 1e-5))[
        :3
    ],
    "instance_norm": lambda x, m, v, w, b: F.instance_norm(
        x, m, v, w, b, use_input_stats=True, momentum=0.3
    ),
}


@pytest.mark.parametrize("image", [(), (4,), (3, 4)])
@pytest.mark.parametrize("name", OPS)
def test_mapped_statistics_take_each_samples_update(name, image):
    if name == "instance_norm" and not image:
        pytest.skip("needs an image")
    f = OPS[name]
    args = (f64(B, N, C, *image), *statistics(B), f64(B, C), f64(B, C))
    mine, theirs = [a.clone() for a in args], [a.clone() for a in args]
    assert_same(vmap(f)(*mine), loop(f)(*theirs))
    assert_same(mine, theirs)
    twice, again = ([torch.stack([a, a * 0.9]) for a in args] for _ in range(2))
    assert_same(vmap(vmap(f))(*twice), loop(loop(f))(*again))
    assert_same(twice, again)


@pytest.mark.parametrize(
    "dims",
    [(0, 0, 0, None, None), (None, 0, 0, 0, 0), (None, 0, 0, None, None), (1, 0, 0, 0, None)],
)
def test_which_arguments_are_mapped(dims):
    args = [f64(N, C, 4), *statistics(), f64(C), f64(C)]
    args = [
        torch.stack([a, a * 0.7, a + 0.1], d) if d is not None else a for a, d in zip(args, dims)
    ]
    mine, theirs = [a.clone() for a in args], [a.clone() for a in args]
    assert_same(vmap(train, dims)(*mine), loop(train, dims)(*theirs))
    assert_same(mine, theirs)


def test_derivatives_with_mapped_statistics():
    f = lambda x, w, b, m, v: (train(x, m, v, w, b) ** 3).sum()
    args = (f64(B, N, C, 4), f64(B, C), f64(B, C))
    stats, copies = statistics(B), None
    copies = [s.clone() for s in stats]
    assert_same(vmap(grad(f, (0, 1, 2)))(*args, *stats), loop(grads(f, (0, 1, 2)))(*args, *copies))
    assert_same(stats, tuple(copies))
    whole = lambda *a: vmap(f)(*a).sin().sum()
    expected = grads(lambda *a: loop(f)(*a).sin().sum(), (0, 1, 2))(
        *args, *[s.clone() for s in stats]
    )
    assert_same(grad(whole, (0, 1, 2))(*args, *[s.clone() for s in stats]), expected)


def net(**kwargs):
    return torch.nn.Sequential(
        torch.nn.Conv1d(C, 4, 2), torch.nn.BatchNorm1d(4, **kwargs)
    ).double()


def test_shared_statistics_cannot_take_an_update_for_each_sample():
    module, x = net(), f64(B, N, C, 6)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    for run in (
        vmap(module),
        vmap(grad(lambda x: module(x).sum())),
        jit(vmap(module)),
        vmap(jit(module)),
    ):
        with pytest.raises(
            AotfuncError, match=r"running statistics.*replace_all_batch_norm_modules_.*eval"
        ):
            run(x)
    assert_same(dict(module.state_dict()), before)


def test_shared_instance_statistics_too():
    module = torch.nn.InstanceNorm1d(C, track_running_stats=True).double()
    with pytest.raises(AotfuncError, match="running statistics"):
        vmap(module)(f64(B, N, C, 6))


def test_the_ways_out():
    x = f64(B, N, C, 6)
    for module in (
        net(track_running_stats=False),
        replace_all_batch_norm_modules_(net()),
        net().eval(),
    ):
        assert_same(vmap(module)(x), loop(module)(x))
        square = lambda x, module=module: (module(x) ** 2).sum()
        assert_same(vmap(grad(square))(x), loop(grads(square))(x))
    module = net()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    each = {k: torch.stack([v] * B) for k, v in buffers.items()}
    out = vmap(lambda b, x: functional_call(module, (parameters, b), (x,)))(each, x)
    singles = [net() for _ in range(B)]
    for s in singles:
        s.load_state_dict(module.state_dict())
    assert_same(out, torch.stack([s(v) for s, v in zip(singles, x)]))
    for name in buffers:
        assert_same(each[name], torch.stack([dict(s.named_buffers())[name] for s in singles]))


def test_an_unmapped_input_updates_shared_statistics_once():
    module, y, w = torch.nn.BatchNorm1d(C).double(), f64(N, C), f64(B, C)
    single = torch.nn.BatchNorm1d(C).double()
    assert_same(
        vmap(lambda w: module(y) * w)(w),
        torch.stack(
            [v * single(y) for v in w[:1]]
            + [v * F.batch_norm(y, None, None, training=True) for v in w[1:]]
        ),
    )
    assert_same(dict(module.named_buffers()), dict(single.named_buffers()))
