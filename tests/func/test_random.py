"""Random numbers: what is drawn, in which order, and the three modes of vmap."""

import pytest
import torch
import torch.nn.functional as F

import aotfunc
from aotfunc import grad, jit, jvp, make_fx, vjp, vmap
from aotfunc.errors import AotfuncError
from tests.reference import assert_same, grads

DRAWS = {
    "rand": lambda x: torch.rand(3),
    "randn": lambda x: torch.randn(3),
    "randint": lambda x: torch.randint(0, 100, (3,)),
    "randperm": lambda x: torch.randperm(5),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 100),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "bernoulli p": lambda x: torch.bernoulli(x, 0.5),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "normal": lambda x: torch.normal(x, 1.0),
    "normal_": lambda x: torch.empty_like(x).normal_(2.0, 3.0),
    "uniform_": lambda x: torch.empty_like(x).uniform_(2.0, 3.0),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "multinomial": lambda x: torch.multinomial(x.abs() + 0.1, 2),
    "poisson": lambda x: torch.poisson(x.abs() * 10),
    "dropout": lambda x: F.dropout(x + 10, 0.5, training=True),
    "alpha_dropout": lambda x: F.alpha_dropout(x + 10, 0.5, training=True),
    "rrelu": lambda x: F.rrelu(-x.abs(), training=True),
}
SEED = 7
# "same" for a draw whose distribution is batched may be refused (torch.func does), as may rrelu
# under vmap; never wrong
MAY_REFUSE = ("bernoulli", "bernoulli p", "normal", "multinomial", "poisson", "rrelu")


def seeded(f, *args):
    torch.manual_seed(SEED)
    return f(*args)


@pytest.mark.parametrize("name", DRAWS)
def test_same_equals_the_unbatched_draw(name):
    draw = DRAWS[name]
    x = torch.randn(6).expand(4, 6)  # equal rows, so that what is drawn from them is equal, too
    try:
        out = seeded(vmap(draw, randomness="same"), x)
    except AotfuncError:
        assert name in MAY_REFUSE
        return
    expected = seeded(draw, x[0])
    for row in out:
        assert_same(row, expected)


@pytest.mark.parametrize("name", DRAWS)
def test_different_differs_by_sample(name):
    x = torch.randn(40).expand(8, 40)
    draw = DRAWS[name]
    if name in ("rand", "randn", "randint"):
        draw = {"rand": lambda x: torch.rand(40), "randn": lambda x: torch.randn(40)}.get(
            name, lambda x: torch.randint(0, 100, (40,))
        )
    if name == "randperm":
        draw = lambda x: torch.randperm(40)
    if name == "multinomial":
        draw = lambda x: torch.multinomial(x.abs() + 0.1, 20)
    try:
        out = seeded(vmap(draw, randomness="different"), x)
    except AotfuncError:
        assert name == "rrelu"
        return
    assert out.shape[0] == 8
    assert len({tuple(row.tolist()) for row in out}) == 8
    assert_same(seeded(vmap(draw, randomness="different"), x), out)  # and the seed decides


@pytest.mark.parametrize(
    "name", ["rand", "randn", "rand_like", "randn_like", "dropout", "normal_", "bernoulli"]
)
def test_different_is_one_draw_of_the_whole_batch(name):
    """As torch.func draws them, so that seeded programs keep their numbers."""
    x = torch.randn(4, 3)
    assert_same(
        seeded(vmap(DRAWS[name], randomness="different"), x),
        seeded(torch.func.vmap(DRAWS[name], randomness="different"), x),
    )


@pytest.mark.parametrize("name", DRAWS)
def test_error_is_the_default(name):
    with pytest.raises(AotfuncError, match=r"randomness|rrelu"):
        vmap(DRAWS[name])(torch.ones(4, 3))


def test_outside_the_mapped_function_nothing_is_asked():
    noise = torch.rand(3)
    assert_same(vmap(lambda x: x + noise)(torch.zeros(2, 3)), noise.expand(2, 3).clone())


@pytest.mark.parametrize("name", DRAWS)
def test_capture_draws_nothing_and_the_graph_draws_as_f(name):
    x = torch.randn(6)
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    gm = make_fx(DRAWS[name])(x)
    assert torch.equal(torch.get_rng_state(), before)
    expected = DRAWS[name](x)
    after = torch.get_rng_state()
    assert_same(seeded(gm, x), expected)
    assert torch.equal(torch.get_rng_state(), after)


def noisy(x):
    a = torch.rand(3)
    torch.randn(5)  # a dead draw still moves the generator
    b = F.dropout(x * a, 0.5, training=True)
    c = torch.rand(3)
    d = torch.rand(3)  # the same call as c, another value
    return (b * c + x * d).sum()


@pytest.mark.parametrize("repeat", [1, 2])
def test_seeded_grad_equals_eager(repeat):
    x = torch.randn(3)
    run = grad(noisy)
    for _ in range(repeat):
        got = seeded(run, x)
    state = torch.get_rng_state()
    assert_same(got, seeded(grads(noisy), x))
    assert torch.equal(torch.get_rng_state(), state)


def test_successive_calls_go_on_drawing():
    x = torch.ones(3)
    f = grad(lambda x: (x * torch.rand(3)).sum())
    torch.manual_seed(SEED)
    got = [f(x) for _ in range(3)]
    torch.manual_seed(SEED)
    assert_same(got, [torch.rand(3) for _ in range(3)])


def test_vjp_uses_the_forward_draw():
    x = torch.ones(100)
    out, pull = vjp(lambda x: F.dropout(x, 0.5, training=True), x)
    assert_same(pull(torch.ones(100))[0], out)
    assert_same(pull(torch.ones(100))[0], out)


def test_jvp_uses_the_forward_draw():
    x = torch.ones(100)
    out, tangent = jvp(lambda x: F.dropout(x, 0.5, training=True), (x,), (torch.ones(100),))
    assert_same(tangent, out)


def test_jit_draws_anew_at_each_call():
    x = torch.ones(3)
    f = jit(lambda x: x * torch.rand(3))
    f(x)
    torch.manual_seed(SEED)
    got = [f(x) for _ in range(3)]
    torch.manual_seed(SEED)
    assert_same(got, [torch.rand(3) for _ in range(3)])


def test_backward_of_aot_function_uses_the_forward_draw():
    x = torch.ones(100, requires_grad=True)
    f = aotfunc.aot_function(
        lambda x: F.dropout(x.sin(), 0.5, training=True) * 2,
        "eager",
        partition_fn=aotfunc.min_cut_rematerialization_partition,
    )
    out = f(x)
    (g,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(g != 0, out != 0)


def test_a_generator_is_by_reference():
    generator = torch.Generator().manual_seed(3)
    f = grad(lambda x: (x * torch.rand(3, generator=generator)).sum())
    x = torch.ones(3)
    got = [f(x), f(x)]
    again = torch.Generator().manual_seed(3)
    assert_same(got, [torch.rand(3, generator=again), torch.rand(3, generator=again)])


def test_a_generator_leaves_the_default_one_alone():
    generator = torch.Generator().manual_seed(3)
    state = torch.get_rng_state()
    grad(lambda x: (x * torch.rand(3, generator=generator)).sum())(torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_seeding_inside_f():
    def f(x):
        torch.manual_seed(5)
        return (x * torch.rand(3)).sum()

    x = torch.ones(3)
    expected = grads(f)(x)
    assert_same(grad(f)(x), expected)
    assert_same(grad(f)(x), expected)


@pytest.mark.parametrize("transform", ["make_fx", "grad", "vjp", "jvp", "vmap"])
def test_a_forked_and_seeded_generator_inside_f(transform):
    """The draw is the same at each call; so is ours, or the error says that it cannot be."""

    def f(x):
        with torch.random.fork_rng():
            torch.manual_seed(42)
            return x * torch.rand(3)

    x = torch.ones(3)
    runs = {
        "make_fx": lambda: make_fx(f)(x)(x),
        "grad": lambda: grad(lambda x: f(x).sum())(x),
        "vjp": lambda: vjp(f, x)[0],
        "jvp": lambda: jvp(f, (x,), (x,))[0],
        "vmap": lambda: vmap(f, randomness="same")(x[None])[0],
    }
    state = torch.get_rng_state()
    try:
        out = runs[transform]()
    except AotfuncError as error:
        assert "seed" in str(error) or "state" in str(error)
    else:
        assert torch.equal(torch.get_rng_state(), state)
        assert_same(out, f(x))


def test_seeding_inside_f_under_jit_is_an_error():
    def f(x):
        torch.manual_seed(5)
        return x * torch.rand(3)

    with pytest.raises(AotfuncError, match="seed"):
        jit(f)(torch.ones(3))


def test_hutchinson_trace():
    """A stochastic estimator by vmap over draws: exact for a diagonal matrix and ±1 probes."""
    a = torch.diag(torch.arange(1.0, 5.0))

    def estimate(_):
        v = torch.randint(0, 2, (4,)).float() * 2 - 1
        return v @ a @ v

    out = vmap(estimate, randomness="different")(torch.zeros(16))
    assert_same(out, torch.full((16,), 10.0))
