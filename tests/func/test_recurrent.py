"""Derivatives of recurrent layers and cells: both modes, second order, and float32, where oneDNN's
layers run."""

import copy
import re
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from aotfunc import aot_module, check_grads, export, functional_call, grad, jit, jvp, make_fx, vmap
from aotfunc.graph import n_ops
from tests.reference import assert_same

nn = torch.nn
LAYERS = [nn.LSTM, nn.GRU, nn.RNN]


def outputs(layer, parameters, x):
    return functional_call(layer, parameters, (x,))[0].sin().sum(-1)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_to_second_order(kind):
    layer = kind(2, 3).double()
    names, values = zip(*((k, v.detach()) for k, v in layer.named_parameters()), strict=True)
    f = lambda *a: outputs(layer, dict(zip(names, a[:-1], strict=True)), a[-1])
    check_grads(f, (*values, torch.randn(4, 2, 2, dtype=torch.float64)), order=2)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_mode_in_float32(kind):
    layer = kind(2, 3)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x, t = torch.randn(4, 2, 2), torch.randn(4, 2, 2)
    got = jvp(lambda x: outputs(layer, parameters, x), (x,), (t,))[1]
    exact = {k: v.double() for k, v in parameters.items()}
    y, s = x.double(), 1e-5 * t.double()
    want = (outputs(layer, exact, y + s) - outputs(layer, exact, y - s)) / 2e-5
    assert_same(got, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_to_second_order(kind):
    cell = kind(2, 3).double()

    def f(x):
        out = cell(x)
        return out[0] if isinstance(out, tuple) else out

    check_grads(f, (torch.randn(2, 2, dtype=torch.float64),), order=2)


# ----- oneDNN's layer of an LSTM, which runs in float32 ------------------------------------------

LSTMS = {
    "one layer": dict(num_layers=1),
    "two layers, both ways": dict(num_layers=2, bidirectional=True),
    "no biases": dict(num_layers=2, bias=False),
    "batch first": dict(num_layers=2, batch_first=True),
}


@pytest.fixture(params=LSTMS)
def lstm(request):
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, **LSTMS[request.param])
    states = torch.randn(2, layer.num_layers * (1 + layer.bidirectional), 2, 4)
    x = torch.randn(2, 3, 3) if layer.batch_first else torch.randn(3, 2, 3)
    values = {k: v.detach() for k, v in layer.named_parameters()}

    def f(parameters, x, h, c, call=functional_call):
        out, (h, c) = call(layer, parameters, (x, (h, c)))
        return (out * h.sum()).sin().sum() + (c * c).sum()

    return f, (values, x, *states)


def gradient_of(f, args):
    """Autograd's gradient of a scalar by all tensors of ``args``, which can be differentiated."""
    flat, tree = tree_flatten(args)
    flat = [t if t.requires_grad else t.detach().requires_grad_() for t in flat]
    return list(torch.autograd.grad(f(*tree_unflatten(flat, tree)), flat, create_graph=True))


def exactly(args):
    """In float64, where autograd differentiates what the layer consists of."""
    return tree_map(torch.Tensor.double, args)


@pytest.mark.parametrize("recording", [True, False])
def test_first_derivatives_are_those_of_the_kernel(lstm, recording):
    f, args = lstm
    with torch.set_grad_enabled(recording):
        got = grad(f, argnums=(0, 1, 2, 3))(*args)
    reference = partial(f, call=torch.func.functional_call)
    assert_same(tree_leaves(got), gradient_of(reference, args))


def test_second_derivatives(lstm):
    f, args = lstm
    every = (0, 1, 2, 3)
    weigh = lambda grads: sum(g.sin().sum() for g in tree_leaves(grads))
    reference = partial(f, call=torch.func.functional_call)
    want = gradient_of(lambda *a: weigh(gradient_of(reference, a)), exactly(args))
    got = grad(lambda *a: weigh(grad(f, every)(*a)), every)(*args)
    assert_same([g.double() for g in tree_leaves(got)], want, rtol=1e-4, atol=1e-5)


def test_a_compiled_lstm_twice():
    torch.manual_seed(0)
    layer, x = nn.LSTM(3, 4), torch.randn(3, 2, 3)

    def penalty(layer, x):
        [g] = gradient_of(lambda x: layer(x)[0].sin().sum(), (x,))
        return gradient_of(lambda *p: g.sin().sum(), tuple(layer.parameters()))

    got = penalty(aot_module(layer), x)
    want = penalty(copy.deepcopy(layer).double(), x.double())
    assert_same([g.double() for g in got], want, rtol=1e-4, atol=1e-5)


def test_tangents_by_every_argument(lstm):
    f, args = lstm
    tangents = tree_map(torch.randn_like, args)
    reference = partial(f, call=torch.func.functional_call)
    got = jvp(f, args, tangents)[1]
    pairs = zip(gradient_of(reference, exactly(args)), tree_leaves(tangents), strict=True)
    assert_same(got.double(), sum((g * t).sum() for g, t in pairs), rtol=1e-4, atol=1e-5)
    # a Hessian-vector product, forwards over the kernel
    got = jvp(grad(f), args, tangents)[1]
    along = lambda *a: sum(
        (g * t).sum()
        for g, t in zip(gradient_of(reference, a), tree_leaves(tangents), strict=True)
    )
    want = gradient_of(along, exactly(args))[: len(args[0])]
    assert_same([g.double() for g in got.values()], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_dims", [(None, 0, 0, 0), (0, 0, None, None), (None, 0, None, None)])
def test_gradients_of_each_sample(lstm, in_dims):
    f, args = lstm
    batch = [
        tree_map(lambda t: torch.stack([t, t.cos()]), a) if d == 0 else a
        for a, d in zip(args, in_dims, strict=True)
    ]
    got = vmap(grad(f, argnums=(0, 1)), in_dims)(*batch)
    reference = partial(f, call=torch.func.functional_call)
    for i in range(2):
        one = [
            tree_map(partial(torch.select, dim=0, index=i), a) if d == 0 else a
            for a, d in zip(batch, in_dims, strict=True)
        ]
        want = gradient_of(reference, exactly(one))[:-2]
        assert_same([g[i].double() for g in tree_leaves(got)], want, rtol=1e-4, atol=1e-5)


def test_the_graph_of_an_lstm_holds_its_kernels():
    layer, x = nn.LSTM(3, 4, 2), torch.randn(50, 2, 3)
    f = lambda x: functional_call(layer, dict(layer.named_parameters()), (x,))[0].sin().sum()
    assert n_ops(make_fx(grad(f))(x).graph) < 20


def test_the_layer_of_weights_that_lie_otherwise():
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    values = {k: v.detach() for k, v in layer.named_parameters()}
    turned = {k: v.mT.contiguous().mT if v.dim() == 2 else v for k, v in values.items()}
    f = lambda p: functional_call(layer, p, (x,))[0].sin().sum()
    assert_same(grad(f)(turned), grad(f)(values))


# ----- loops, where the backend has them in native code ------------------------------------------


@pytest.mark.parametrize(
    "kind, options",
    [
        (nn.RNN, {"nonlinearity": "relu", "bias": False}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3}),
        (nn.LSTM, {"num_layers": 2}),
    ],
)
def test_a_layer_as_a_loop(kind, options):
    """Results, their strides, draws, and derivatives to second order are eager's, and those of a
    batch each sample's."""
    layer, x = kind(3, 4, **options).double(), torch.randn(2, 5, 3, dtype=torch.float64)
    compiled, parameters = aot_module(layer, "cpp"), [*layer.parameters()]

    def all_of_it(f):
        torch.manual_seed(0)
        outs = tree_leaves(f(x))
        gradients = torch.autograd.grad(
            sum(o.sin().sum() for o in outs), parameters, create_graph=True
        )
        squares = sum(g.square().sum() for g in gradients)
        return outs, gradients, torch.autograd.grad(squares, parameters)

    expected = all_of_it(layer)
    assert_same(all_of_it(compiled), expected)
    assert [o.stride() for o in tree_leaves(compiled(x))] == [o.stride() for o in expected[0]]
    loops = layer.num_layers * (1 + layer.bidirectional)
    assert len(re.findall(r" = \w*_scan\w*\(", compiled.lower(x).code)) == loops
    layer.eval()
    loss = lambda x: outputs(layer, dict(layer.named_parameters()), x).sum()
    xs = torch.stack([x, x + 1])
    assert_same(jit(vmap(grad(loss)), "cpp")(xs), torch.stack([grad(loss)(x) for x in xs]))
    for graph in make_fx(layer)(x), export(compiled, x).graphs["function"]:  # for others to read
        assert "scan" not in graph.code
