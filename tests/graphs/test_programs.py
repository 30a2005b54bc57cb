"""Golden texts: what a captured program looks like: writes, marks of intent, trees of arguments, names and lines."""

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.utils.checkpoint import checkpoint

from aotfunc import functional_call, functionalize, grad, jit, make_fx
from tests.graphs.shown import readable, shown

T = torch.func


def r(*shape):
    torch.manual_seed(0)
    return torch.randn(shape)


# writes --------------------------------------------------------------------------------------------------------------


def test_write_through_a_view():
    def f(x):
        y = x.clone()
        y.t()[1] += 1
        return y

    assert_expected_inline(shown(f, r(2, 3)), """""")


def test_write_through_a_view_of_a_view():
    def f(x):
        y = x * 2
        y[1:].view(-1)[::2].mul_(3)
        return y.sum(0)

    assert_expected_inline(shown(f, r(3, 2)), """""")


def test_write_at_indices():
    def f(x, i, v):
        y = x.sin()
        y[i] = v
        return y

    assert_expected_inline(shown(f, r(4, 2), torch.tensor([2, 0]), r(2, 2)), """""")


def test_write_to_an_input_comes_last():
    def f(x, y):
        x.add_(y)
        return x * 2

    assert_expected_inline(shown(f, r(3), r(3)), """""")


def test_write_to_a_part_of_an_input():
    def f(x):
        x[0].zero_()
        return x.sum()

    assert_expected_inline(shown(f, r(2, 3)), """""")


def test_gradient_through_a_write():
    def f(x):
        y = x * 2
        y[0] = y[1] * x[0]
        return y.sum()

    assert_expected_inline(shown(grad(f), r(3), like=T.grad(f)), """""")


def test_functionalize():
    def f(x):
        y = torch.zeros(3)
        y.copy_(x)
        y.relu_()
        return y

    assert_expected_inline(shown(functionalize(f), r(3), like=f), """""")


def test_batch_norm_in_training_updates_its_statistics():
    net = nn.BatchNorm1d(2)
    f = lambda mean, var, x: F.batch_norm(x, mean, var, net.weight.detach(), net.bias.detach(), training=True)
    assert_expected_inline(shown(f, torch.zeros(2), torch.ones(2), r(4, 2)), """""")


# intent ---------------------------------------------------------------------------------------------------------------


def test_detach_stays_visible():
    f = lambda x: x.detach() * x
    assert_expected_inline(shown(f, r(3)), """""")


def test_gradient_stops_at_detach():
    f = lambda x: (x.detach() * x.sin()).sum()
    assert_expected_inline(shown(grad(f), r(3), like=T.grad(f)), """""")


def test_gradient_stops_at_no_grad():
    def f(x):
        with torch.no_grad():
            scale = x.norm()
        return (x.sin() / scale).sum()

    assert_expected_inline(shown(grad(f), r(3), like=T.grad(f)), """""")


def test_hidden_write_keeps_the_old_derivative():
    def f(x):
        y = x.sin()
        with torch.no_grad():
            y.mul_(3)
        return (y * y).sum()

    x = r(3)

    def by_autograd(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    assert_expected_inline(shown(grad(f), x, like=by_autograd), """""")


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (g * x.exp()).clamp(-1, 1)


def by_autograd(f):
    def run(x, *rest):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x, *rest), x)[0]

    return run


def test_custom_function_is_its_forward():
    assert_expected_inline(shown(lambda x: Clipped.apply(x), r(3)), """""")


def test_custom_function_has_its_own_backward():
    f = lambda x: Clipped.apply(x).sum()
    assert_expected_inline(shown(grad(f), r(3), like=by_autograd(f)), """""")


def test_checkpoint_computes_again():
    f = lambda x: checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False).square().sum()
    assert_expected_inline(shown(grad(f), r(3), like=by_autograd(f)), """""")


def test_autograd_grad_inside():
    def f(x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(x.sin().sum(), x, create_graph=True)
        return g * x

    assert_expected_inline(shown(f, r(3), like=lambda x: f(x).detach()), """""")


# trees, names, lines -----------------------------------------------------------------------------------------------


def test_dict_and_tuple_of_inputs():
    f = lambda params, pair: {"out": params["w"] * pair[0] + params["b"], "kept": [pair[1]]}
    assert_expected_inline(shown(f, {"w": r(3), "b": r(3)}, (r(3), r(3))), """""")


def test_keywords_and_python_values():
    f = lambda x, power=2, *, scale: (x**power) * scale
    assert_expected_inline(shown(f, r(3), power=3, scale=r(3)), """""")


def test_names_are_those_of_the_parameters():
    def step(weights, batch, momentum):
        return weights - 0.1 * (batch.mean(0) + momentum)

    assert_expected_inline(shown(step, r(3), r(5, 3), r(3)), """""")


def test_closed_over_parameters():
    layer = nn.Linear(3, 2)
    shift = r(2)
    assert_expected_inline(shown(lambda x: layer(x) + shift, r(4, 3), like=lambda x: (layer(x) + shift).detach()), """""")


def test_gradient_of_a_module():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    params = {k: v.detach() for k, v in net.named_parameters()}
    f = lambda params, x: functional_call(net, params, (x,)).sum()
    assert_expected_inline(shown(grad(f), params, r(5, 3), like=T.grad(f)), """""")


def test_constant_and_passed_through_results():
    assert_expected_inline(shown(lambda x, y: (x, 3, None, y.sin()), r(3), r(3)), """""")


def test_equal_expressions_are_computed_once():
    assert_expected_inline(shown(lambda x: x.sin() * x.sin() + (x + 1.0) * (1.0 + x), r(3)), """""")


def test_dead_code_is_gone():
    def f(x):
        x.exp()
        return x.sin()

    assert_expected_inline(shown(f, r(3)), """""")


def test_lines_of_the_user():
    def f(x):
        y = torch.sin(x)
        return (y * y).sum()

    assert_expected_inline(readable(make_fx(grad(f), verbose=True)(r(3)).code), """""")


# nested compiled calls, random numbers -------------------------------------------------------------------------------


def test_jit_inside_a_gradient_is_inlined():
    g = jit(lambda x: torch.sin(x) * x)
    f = lambda x: (g(x) ** 2).sum()
    like = T.grad(lambda x: ((torch.sin(x) * x) ** 2).sum())
    assert_expected_inline(shown(grad(f), r(3), like=like), """""")


def test_jit_of_a_gradient_is_inlined():
    f = jit(grad(lambda x: torch.sin(x).sum()))
    assert_expected_inline(shown(lambda x: f(x) + 1, r(3), like=lambda x: x.cos() + 1), """""")


def test_dropout():
    f = lambda x: F.dropout(x, 0.5).sin().sum()
    assert_expected_inline(shown(grad(f), r(8), like=by_autograd(f)), """""")


def test_draws_stay_in_order_even_when_nobody_reads_them():
    def f(x):
        torch.randn(2)
        return x * torch.rand(3) + torch.randn_like(x)

    assert_expected_inline(shown(f, r(3)), """""")
