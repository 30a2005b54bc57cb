"""RNN, LSTM and GRU under vmap: mapped inputs, states, weights; cells, layers, both directions;
against a loop."""

import pytest
import torch

from aotfunc import functional_call, grad, jit, jvp, stack_module_state, vjp, vmap
from tests.inputs import f64
from tests.reference import assert_same, grads, jvps, loop

B, T, N, I, H = 3, 4, 2, 3, 5


def outputs(out):
    """What a layer returns, flat."""
    return tuple(torch.utils._pytree.tree_leaves(out))


def network(kind, **how):
    torch.manual_seed(0)
    return getattr(torch.nn, kind)(I, H, **how).double()


LAYERS = {
    "RNN": lambda: network("RNN"),
    "RNN relu": lambda: network("RNN", nonlinearity="relu"),
    "LSTM": lambda: network("LSTM"),
    "GRU": lambda: network("GRU"),
    "LSTM, two layers": lambda: network("LSTM", num_layers=2),
    "GRU, two layers": lambda: network("GRU", num_layers=2),
    "RNN, both directions": lambda: network("RNN", bidirectional=True),
    "LSTM, both directions": lambda: network("LSTM", bidirectional=True),
    "GRU, both directions": lambda: network("GRU", bidirectional=True),
    "LSTM, batch first": lambda: network("LSTM", batch_first=True),
    "GRU, batch first": lambda: network("GRU", batch_first=True),
    "LSTM without bias": lambda: network("LSTM", bias=False),
    "GRU without bias": lambda: network("GRU", bias=False),
    "LSTM, projected": lambda: network("LSTM", proj_size=2),
    "RNNCell": lambda: network("RNNCell"),
    "LSTMCell": lambda: network("LSTMCell"),
    "GRUCell": lambda: network("GRUCell"),
}


def single(name):
    """The module, a scalar of its results that weighs them differently, and a maker of one
    sample's input."""
    module = LAYERS[name]()

    def f(parameters, x):
        return outputs(functional_call(module, parameters, (x,)))

    def scalar(parameters, x):
        return sum(
            (o * torch.arange(1.0, o.numel() + 1, dtype=o.dtype).reshape(o.shape).cos()).sum()
            for o in f(parameters, x)
        )

    make = (
        (lambda *lead: f64(*lead, N, I)) if "Cell" in name else (lambda *lead: f64(*lead, T, N, I))
    )
    return module, dict(module.named_parameters()), f, scalar, make


def each(parameters):
    """Parameters of B modules."""
    return {
        k: torch.stack([v.detach() * (1 - 0.1 * i) for i in range(B)])
        for k, v in parameters.items()
    }


@pytest.mark.parametrize("mapped", ["input", "weights", "both"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_a_loop(name, mapped):
    _, parameters, f, scalar, make = single(name)
    parameters = (
        each(parameters) if mapped != "input" else {k: v.detach() for k, v in parameters.items()}
    )
    x = make(B) if mapped != "weights" else make()
    p_dims = dict.fromkeys(parameters, 0 if mapped != "input" else None)
    dims = (p_dims, 0 if mapped != "weights" else None)
    given = (dims[0] if mapped != "input" else None, dims[1])
    assert_same(vmap(f, given)(parameters, x), loop(f, dims)(parameters, x))
    assert_same(
        vmap(grad(scalar, (0, 1)), given)(parameters, x),
        loop(grads(scalar, (0, 1)), dims)(parameters, x),
    )
    whole = lambda p, x: vmap(scalar, given)(p, x).sin().sum()
    reference = lambda p, x: loop(scalar, dims)(p, x).sin().sum()
    assert_same(grad(whole, (0, 1))(parameters, x), grads(reference, (0, 1))(parameters, x))


@pytest.mark.parametrize(
    "name", ["RNN", "LSTM", "GRU", "GRU, both directions", "GRUCell", "LSTMCell"]
)
def test_twice_and_forwards(name):
    _, parameters, f, scalar, make = single(name)
    parameters = {k: v.detach() for k, v in parameters.items()}
    g = lambda x: scalar(parameters, x)
    x, t = make(2, B), make(B)
    assert_same(vmap(vmap(grad(g)))(x), loop(loop(grads(g)))(x))
    forward = lambda x, t: jvp(g, (x,), (t,))
    assert_same(vmap(forward)(x[0], t), loop(lambda x, t: jvps(g, (x,), (t,)))(x[0], t))
    second = lambda f, grad, **how: lambda x: (grad(f, **how)(x) ** 2).sum()
    assert_same(
        vmap(grad(second(g, grad)))(x[0]), loop(grads(second(g, grads, create_graph=True)))(x[0])
    )
    assert_same(jit(vmap(grad(g)))(x[0]), loop(grads(g))(x[0]))


@pytest.mark.parametrize(
    "name", ["RNN", "LSTM", "GRU", "LSTM, both directions", "GRU, two layers"]
)
def test_given_states(name):
    module = LAYERS[name]()
    states = module.num_layers * (2 if module.bidirectional else 1)
    pair = isinstance(module, torch.nn.LSTM)

    def f(x, *state):
        return outputs(module(x, state if pair else state[0]))

    for dims in ((0, 0, 0), (None, 0, 0), (0, None, None), (1, 2, 0))[: 4 if pair else 3]:
        shapes = [(T, N, I), (states, N, H), (states, N, H)][: 3 if pair else 2]
        args = [
            torch.stack([a, a * 0.5, a + 1], d) if d is not None else a
            for a, d in zip(map(lambda s: f64(*s), shapes), dims)
        ]
        here = dims[: len(args)]
        assert_same(vmap(f, here)(*args), loop(f, here)(*args))
        total = lambda *a: sum(o.sin().sum() for o in f(*a))
        assert_same(
            vmap(grad(total, (0, 1)), here)(*args), loop(grads(total, (0, 1)), here)(*args)
        )


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_an_ensemble_as_torch_writes_it(kind):
    modules = [network(kind) for _ in range(B)]
    for k, m in enumerate(modules):
        for p in m.parameters():
            p.data.mul_(1 + 0.1 * k)
    parameters, buffers = stack_module_state(modules)
    x = f64(T, N, I)
    out = vmap(lambda p, b, x: outputs(functional_call(modules[0], (p, b), (x,))), (0, 0, None))(
        parameters, buffers, x
    )
    assert_same(out, tuple(torch.stack(o) for o in zip(*[outputs(m(x)) for m in modules])))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_an_unbatched_sequence(kind):
    """torch takes (T, I) without a batch of its own."""
    module, x = network(kind), f64(B, T, I)
    f = lambda x: outputs(module(x))
    assert_same(vmap(f)(x), loop(f)(x))
    assert_same(
        vmap(lambda x: vjp(f, x)[1](tuple(torch.ones_like(o) for o in f(x)))[0])(x),
        loop(grads(lambda x: sum(o.sum() for o in f(x))))(x),
    )


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_packed_sequence(kind):
    module, lengths = network(kind), torch.tensor([4, 2])

    def f(x):
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
        out, state = module(packed)
        return outputs((out.data, state))

    x = f64(B, T, N, I)
    assert_same(vmap(f)(x), loop(f)(x))
    total = lambda x: sum(o.sin().sum() for o in f(x))
    assert_same(vmap(grad(total))(x), loop(grads(total))(x))


@pytest.mark.parametrize("count", [None, 1, 2])
@pytest.mark.parametrize(
    "how", [{}, {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}]
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_in_float32_on_the_kernels_of_onednn(kind, how, count):
    torch.manual_seed(0)
    module = getattr(torch.nn, kind)(I, H, **how)
    shape = (T, I) if count is None else (count, T, I) if how.get("batch_first") else (T, count, I)
    x, states = torch.randn(B, *shape), each(dict(module.named_parameters()))
    f = lambda p, x: outputs(functional_call(module, p, (x,)))
    total = lambda p, x: sum(o.sin().sum() for o in f(p, x))
    plain = {k: v.detach() for k, v in module.named_parameters()}
    none, mapped = dict.fromkeys(plain), dict.fromkeys(plain, 0)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for dims, given, p, sample in (
        ((none, 0), (None, 0), plain, x),
        ((mapped, None), (0, None), states, x[0]),
        ((mapped, 0), (0, 0), states, x),
    ):
        with torch.no_grad():
            assert_same(vmap(f, given)(p, sample), loop(f, dims)(p, sample), **tolerance)
        assert_same(
            vmap(grad(total, (0, 1)), given)(p, sample),
            loop(grads(total, (0, 1)), dims)(p, sample),
            **tolerance,
        )
