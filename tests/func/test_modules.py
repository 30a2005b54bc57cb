"""Modules as functions: functional_call, stacking for ensembles, make_functional, batch norm
without statistics."""

import copy

import torch
from torch import nn

from aotfunc import (
    combine_state_for_ensemble,
    functional_call,
    grad,
    make_functional,
    make_functional_with_buffers,
    replace_all_batch_norm_modules_,
    stack_module_state,
    vmap,
)
from tests.inputs import f64
from tests.reference import assert_same, grads, loop


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def with_statistics():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def test_functional_call_takes_the_given_parameters():
    net, x = mlp(), f64(5, 3)
    doubled = {k: 2 * v.detach() for k, v in net.named_parameters()}
    other = mlp()
    other.load_state_dict(doubled)
    assert_same(functional_call(net, doubled, (x,)), other(x))
    assert_same(functional_call(net, (doubled, {}), x), other(x))


def test_grad_through_functional_call():
    net, x = mlp(), f64(5, 3)
    params = {k: v.detach() for k, v in net.named_parameters()}
    loss = lambda p: functional_call(net, p, (x,)).square().mean()
    assert_same(grad(loss)(params), grads(loss)(params))


def test_ensemble_by_stack_module_state():
    models, x = [mlp() for _ in range(4)], f64(5, 3)
    params, buffers = stack_module_state(models)
    base = mlp().to("meta")
    out = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), (0, 0, None))(
        params, buffers, x
    )
    assert_same(out, torch.stack([m(x) for m in models]))


def test_ensemble_by_combine_state():
    models, x = [mlp() for _ in range(4)], f64(5, 3)
    fmodel, params, buffers = combine_state_for_ensemble(models)
    out = vmap(fmodel, in_dims=(0, 0, None))(params, buffers, x)
    assert_same(out, torch.stack([m(x) for m in models]))


def test_ensemble_training_step():
    models, x, y = [mlp() for _ in range(3)], f64(5, 3), f64(5, 2)
    params, _ = stack_module_state(models)
    base = mlp().to("meta")
    loss = lambda p: (functional_call(base, p, (x,)) - y).square().mean()
    params = {k: v.detach() for k, v in params.items()}
    assert_same(vmap(grad(loss))(params), loop(grads(loss))(params))


def test_make_functional():
    net, x = mlp(), f64(5, 3)
    func, params = make_functional(net)
    assert_same(func(params, x), net(x))
    assert len(params) == 4
    shifted = tuple(p.detach() + 1 for p in params)
    loss = lambda p: func(p, x).sum()
    assert_same(grad(loss)(shifted), grads(loss)(shifted))


def test_what_make_functional_returns_is_a_module():
    net, x = mlp(), f64(5, 3)
    func, params = make_functional(net)
    assert isinstance(func, torch.nn.Module) and type(func.stateless_model) is type(net)
    assert func.param_names == tuple(n for n, _ in net.named_parameters())
    assert all(p.device.type == "meta" for p in func.parameters())
    twin = copy.deepcopy(func)
    assert_same(twin(params, x), net(x))
    loss = lambda p: twin(p, x).sum()
    assert_same(grad(loss)(params), grads(loss)(params))
    assert_same(vmap(func, in_dims=(None, 0))(params, x), net(x))


def test_make_functional_without_tracking():
    func, params = make_functional(mlp(), disable_autograd_tracking=True)
    assert not any(p.requires_grad for p in params)


def test_make_functional_with_buffers():
    net, x = with_statistics().eval(), f64(5, 3)
    func, params, buffers = make_functional_with_buffers(net)
    assert_same(func(params, buffers, x), net(x))
    loss = lambda p: func(p, buffers, x).square().sum()
    params = tuple(p.detach() for p in params)
    assert_same(grad(loss)(params), grads(loss)(params))


def test_batch_norm_statistics_are_written_through_functional_call():
    net, x = with_statistics(), f64(5, 3)
    reference = with_statistics()
    reference.load_state_dict(net.state_dict())
    params = {k: v.detach() for k, v in net.named_parameters()}
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    grad(lambda p: functional_call(net, (p, buffers), (x,)).square().sum())(params)
    reference(x)
    assert_same(buffers, dict(reference.named_buffers()))


def test_replace_all_batch_norm_modules():
    net = replace_all_batch_norm_modules_(with_statistics())
    assert net[1].running_mean is None and not net[1].track_running_stats
    x = f64(4, 5, 3)
    params = {k: v.detach() for k, v in net.named_parameters()}
    f = lambda p, x: functional_call(net, p, (x,)).square().mean()
    assert_same(vmap(grad(f), (None, 0))(params, x), loop(grads(f), (None, 0))(params, x))


def test_tied_weights():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    net[1].weight = net[0].weight
    params = {k: v.detach() for k, v in net.named_parameters()}
    x = f64(2, 3)
    loss = lambda p: functional_call(net, p, (x,)).square().sum()
    assert_same(grad(loss)(params), grads(loss)(params))
