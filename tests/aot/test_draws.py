"""Random numbers: every way to draw, into every layout, is eager's at one seed and leaves the
generators alike."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import partitioners

import aotfunc as A
from aotfunc.partition import PartitionError
from tests.aot.compilers import Watched
from tests.reference import assert_same


def ramp(*shape):
    return torch.linspace(0.05, 0.95, max(1, torch.Size(shape).numel())).reshape(shape)


LAYOUTS = {
    "contiguous": lambda: ramp(2, 3, 4, 4),
    "transposed": lambda: ramp(3, 4).t(),
    "permuted": lambda: ramp(2, 3, 4).permute(2, 0, 1),
    "channels_last": lambda: ramp(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "expanded": lambda: ramp(3, 1).expand(3, 4),
    "with gaps": lambda: ramp(4, 6)[:, ::2],
    "with gaps, transposed": lambda: ramp(4, 6)[1:, ::2].t(),
    "a dimension of size 1": lambda: ramp(4, 1, 3).permute(2, 1, 0),
    "one number": lambda: ramp(),
    "empty": lambda: torch.empty(3, 0, 2).permute(2, 0, 1),
    "more than a vector": lambda: ramp(30, 20).t(),
    "bfloat16": lambda: ramp(3, 4).bfloat16().t(),
}


def sampled(name, *args):
    """A sampler in place: on the layout of the argument, and on a view of a new tensor."""

    def f(x):
        y, z = torch.empty_like(x), torch.zeros(20, 30)
        getattr(y, name)(*args)
        getattr(z.t()[::2, 3:], name)(*args)
        return y, z, x * y

    return f


def matrix(x):
    return (
        x if 0 < x.dim() < 3 else x.reshape(-1, max(x.shape[-1], 1)) if x.dim() else x.reshape(1)
    )


DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in place": lambda x: F.dropout(x * 1, 0.5, inplace=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "feature_alpha_dropout": lambda x: torch.feature_alpha_dropout(x, 0.5, True),
    "bernoulli": torch.bernoulli,
    "bernoulli(p)": lambda x: torch.bernoulli(x, 0.3),
    "bernoulli_(tensor)": lambda x: torch.empty_like(x).bernoulli_(x),
    "rand_like": lambda x: x * torch.rand_like(x) + torch.randn_like(x) + torch.randint_like(x, 9),
    "rand": lambda x: x * torch.rand(x.shape, dtype=x.dtype) + torch.randint(0, 9, x.shape),
    "rand_like, contiguous": lambda x: torch.rand_like(x, memory_format=torch.contiguous_format),
    "normal": lambda x: (torch.normal(x, 1.0), torch.normal(x, x + 1), torch.normal(0.0, x)),
    "poisson": lambda x: torch.poisson(x * 5) + x,
    "binomial": lambda x: torch.binomial(torch.full_like(x, 10), x),
    "rrelu": lambda x: F.rrelu(x - 0.5, training=True),
    "rrelu in place": lambda x: F.rrelu(x - 0.5, training=True, inplace=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(matrix(x), dim=0),
    "multinomial": lambda x: torch.multinomial(matrix(x), 1),
    "standard gamma": lambda x: torch._standard_gamma(x + 1),
    "randperm": lambda x: x.flatten()[torch.randperm(x.numel())],
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x, 2, output_size=2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
}
SAMPLERS = {
    "uniform_": (0, 1),
    "normal_": (0, 1),
    "exponential_": (1.0,),
    "cauchy_": (),
    "log_normal_": (),
}
SAMPLERS |= {"geometric_": (0.3,), "random_": (2, 10), "bernoulli_": (0.3,)}
DRAWS |= {name: sampled(name, *args) for name, args in SAMPLERS.items()}


def with_backward(f):
    """Results, and the gradient of a weighted sum of them."""

    def run(x):
        x = x.detach().requires_grad_()
        outs = f(x)
        outs = outs if isinstance(outs, tuple) else (outs,)
        total = sum((o.float() * ramp(*o.shape)).sum() for o in outs if o.is_floating_point())
        known = getattr(total, "requires_grad", False)
        return (
            *outs,
            torch.autograd.grad(total, x)[0] if known else torch.zeros(x.shape, dtype=x.dtype),
        )

    return run


WRAPPERS = {
    "jit": lambda f: (A.jit(f), f),
    "jit, backward": lambda f: (with_backward(A.jit(f)), with_backward(f)),
    "aot_function, backward": lambda f: (
        with_backward(A.aot_function(f, lambda gm, example_inputs: gm)),
        with_backward(f),
    ),
    "functionalize": lambda f: (A.functionalize(f), f),
    "make_fx": lambda f: (lambda x: seeded(A.make_fx(f)(x), x)[0], f),
    "vmap": lambda f: (
        lambda x: torch.utils._pytree.tree_map(
            lambda y: y[1], A.vmap(f, randomness="same")(torch.stack([x, x]))
        ),
        lambda x: f(torch.stack([x, x])[1]),
    ),
}
#: cannot share a draw, or draw as many numbers as there are negative ones
NOT_SHARED = (
    "poisson",
    "binomial",
    "standard gamma",
    "rrelu",
    "rrelu in place",
    "multinomial",
    "gumbel_softmax",
)


def seeded(f, x):
    torch.manual_seed(3)
    return f(x), torch.get_rng_state()


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_draws_are_those_of_eager(wrapper, draw):
    if wrapper == "vmap" and draw in NOT_SHARED:
        pytest.skip("no draw to share")
    ours, eager = WRAPPERS[wrapper](DRAWS[draw])
    for name, layout in LAYOUTS.items():
        try:
            want = seeded(eager, layout())
        except (RuntimeError, IndexError, ValueError):  # not for this shape
            continue
        for _ in range(2):
            got = seeded(ours, layout())
            tolerance = {"atol": 2e-2, "rtol": 2e-2} if name == "bfloat16" else {}
            try:
                assert_same(got, want, strides=wrapper != "vmap" and name != "empty", **tolerance)
            except AssertionError as e:
                raise AssertionError(f"{name}: {e}") from None


@pytest.mark.parametrize("compiled", [A.jit, lambda f: A.aot_function(f, "eager")])
def test_a_transformer_layer(compiled):
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), ramp(4, 5, 16)

    def run(f):
        torch.manual_seed(3)
        layer.zero_grad()
        y = f(x)
        y.square().sum().backward()
        return y, [p.grad for p in layer.parameters()], torch.get_rng_state()

    want, g = run(layer), compiled(layer)
    for _ in range(2):
        assert_same(run(g), want, atol=1e-4, rtol=1e-4)


def test_recurrent_dropout():
    net, x = nn.LSTM(3, 4, 3, dropout=0.5), ramp(5, 2, 3)
    want = seeded(net, x)
    assert_same(seeded(A.jit(net), x), want)


# ----- partitions of others ----------------------------------------------------------------------


class Masked(torch.autograd.Function):
    """Draws in the forward what only the backward reads."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.rand_like(x))
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Noisy(torch.autograd.Function):
    """Draws in the backward."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return F.dropout(g, 0.5)


DRAWING = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout of what is saved": lambda x: F.layer_norm(F.dropout(x.sin(), 0.3), (64,)),
    "two": lambda x: F.dropout(x.sin(), 0.5) * torch.rand_like(x),
    "a draw for nothing": lambda x: (
        torch.rand(2),
        torch.native_dropout(x, 0.5, True),
        F.dropout(x * 2, 0.5).sin(),
    )[2],
    "for the backward alone": lambda x: F.dropout(Masked.apply(x).sin(), 0.5),
    "in the backward": lambda x: Noisy.apply(F.dropout(x.sin(), 0.5)) * 2,
}
PARTITIONS = {
    "default": A.default_partition,
    "min-cut": A.min_cut_rematerialization_partition,
    "torch's default": partitioners.default_partition,
    "torch's min-cut": partitioners.min_cut_rematerialization_partition,
}


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("program", DRAWING)
def test_a_draw_runs_once_in_the_half_that_it_belongs_to(program, partition):
    f, watched = DRAWING[program], Watched()

    def run(f):
        torch.manual_seed(0)
        x = ramp(64).requires_grad_()
        y = f(x)
        between = torch.get_rng_state()
        y.sum().backward()
        return y, x.grad, between, torch.get_rng_state()

    g = A.aot_function(f, watched.compiler, partition_fn=PARTITIONS[partition])
    for _ in range(2):
        assert_same(run(g), run(f))
    assert watched.calls == 2


def moved(joint, inputs, *, num_fwd_outputs):
    """A partition that draws again."""
    for n in joint.graph.nodes:
        n.meta.pop("partitioner_tag", None)
    return partitioners.default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs)


def exchanged(joint, inputs, *, num_fwd_outputs):
    return A.default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs)[::-1]


@pytest.mark.parametrize(
    "partition, message",
    [(moved, r"moved: the backward draws .*bernoulli"), (exchanged, "exchanged: inputs of the")],
)
def test_a_wrong_partition_is_refused(partition, message):
    x, state = ramp(64).requires_grad_(), torch.get_rng_state()
    with pytest.raises(PartitionError, match=message):
        A.aot_function(DRAWING["dropout of what is saved"], "eager", partition_fn=partition)(x)
    assert torch.equal(torch.get_rng_state(), state)


# ----- generators of one's own -------------------------------------------------------------------

GENERATOR, OTHER = torch.Generator(), torch.Generator()


def from_generators(x):
    y = x * torch.rand(3, generator=GENERATOR) + torch.randn(3, generator=GENERATOR) * torch.rand(
        3, generator=OTHER
    )
    y = (
        y
        + torch.bernoulli(x.sigmoid(), generator=GENERATOR)
        + torch.empty(3).exponential_(generator=OTHER)
    )
    return y + torch.zeros(3).random_(2, 10, generator=GENERATOR)


def reseeded(f, *args):
    GENERATOR.manual_seed(1), OTHER.manual_seed(2)
    return f(*args), GENERATOR.get_state(), OTHER.get_state(), torch.get_rng_state()


@pytest.mark.filterwarnings("ignore::aotfunc.errors.BackendWarning")  # inductor takes none
@pytest.mark.parametrize(
    "compiled",
    [
        A.jit,
        lambda f: A.jit(f, "inductor"),
        *[
            lambda f, p=p: A.aot_function(f, lambda gm, inputs: gm, partition_fn=p)
            for p in PARTITIONS.values()
        ],
        lambda f: lambda x: A.make_fx(f)(x)(x),
        lambda f: lambda x: torch.fx.Interpreter(A.make_fx(f)(x)).run(x),
    ],
)
def test_generators_of_ones_own(compiled):
    g, x = compiled(from_generators), ramp(3)
    want = reseeded(from_generators, x)
    for _ in range(2):
        assert_same(reseeded(g, x), want)
    x.requires_grad_()
    assert_same(reseeded(with_backward(g), x)[0], reseeded(with_backward(from_generators), x)[0])


def test_a_graph_with_generators_is_python():
    x = ramp(3)
    gm = A.make_fx(from_generators)(x)
    assert "generator = generator0" in gm.code and " object at " not in gm.code
    assert_same(reseeded(torch.fx.GraphModule(gm, gm.graph), x), reseeded(from_generators, x))


def test_a_generator_argument_is_by_reference():
    f = lambda x, g: x * torch.rand(3, generator=g)
    x = ramp(3)
    for call in (A.jit(f), A.aot_function(f, lambda gm, inputs: gm), A.make_fx(f)(x, GENERATOR)):
        for g in (GENERATOR, OTHER, GENERATOR):
            assert_same(reseeded(call, x, g), reseeded(f, x, g))


# ----- seeds -------------------------------------------------------------------------------------


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.by_name = torch.Generator(), {"one": torch.Generator()}

    def forward(self, x):
        return x + torch.rand(3, generator=self.generator) * helper(self)


def helper(module):
    return torch.rand(3, generator=module.by_name["one"]) + torch.rand(3, generator=OTHER)


def test_generators_are_found_wherever_f_finds_them():
    noise, x = Noise(), ramp(3)

    def run(f):
        for g in (noise.generator, noise.by_name["one"], OTHER):
            g.manual_seed(5)
        return f(x), f(x), [g.get_state() for g in (noise.generator, noise.by_name["one"], OTHER)]

    assert_same(run(A.jit(noise)), run(noise))
    noise.generator = torch.Generator()
    assert_same(run(A.jit(noise)), run(noise))


def reseeds(x):
    GENERATOR.manual_seed(5)
    return x * torch.rand(3, generator=GENERATOR)


def reseeds_between(x):
    y = x * torch.rand(3, generator=GENERATOR)
    return y * reseeds(x)


def forks(x):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        y = x * torch.rand(3)
    return y * torch.rand(3)


def seeds(x):
    torch.manual_seed(5)
    return x * torch.rand(3)


def sets_state(x):
    torch.set_rng_state(torch.Generator().manual_seed(9).get_state())
    return x * torch.rand(3)


def goes_back(x):
    state, y = torch.get_rng_state(), x * torch.rand(3)
    torch.set_rng_state(state)
    return y * torch.rand(3)


def shows_state(x):
    return x * torch.rand(3), torch.get_rng_state()


SEEDING = {
    "makes one": lambda x: x * torch.rand(3, generator=torch.Generator().manual_seed(0)),
    "seed": lambda x: (torch.seed(), x * 0)[1],
}
SEEDING |= {
    f.__name__: f
    for f in (reseeds, reseeds_between, forks, seeds, sets_state, goes_back, shows_state)
}


@pytest.mark.parametrize("program", SEEDING)
@pytest.mark.parametrize("wrapper", [A.jit, lambda f: A.aot_function(f, "eager"), A.functionalize])
def test_seeding_inside_is_eagers_or_refused(wrapper, program):
    f, x = SEEDING[program], ramp(3)

    def twice(g):
        torch.manual_seed(1)
        return reseeded(lambda x: (g(x), g(x)), x)

    want = twice(f)
    torch.manual_seed(1)
    before = reseeded(lambda: None)
    compiled = wrapper(f)
    try:
        got = compiled(x)
    except A.errors.CaptureError as e:
        assert "test_draws.py" in str(e)
        assert_same(
            (None, GENERATOR.get_state(), OTHER.get_state(), torch.get_rng_state()), before
        )
    else:
        del got
        assert wrapper is A.functionalize
        if program != "seed":
            assert_same(twice(compiled), want)


def test_numbers_of_python_and_numpy_are_drawn_anew():
    f, x = lambda x: x * random.random() * float(np.random.rand()), ramp(3)

    def run(f):
        random.seed(0), np.random.seed(0)
        return f(x), f(x), f(x)

    assert_same(run(A.jit(f)), run(f))
