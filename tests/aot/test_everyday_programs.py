"""Programs as people write them, of torch's own parts that ask for numbers or act behind a
recording's back."""

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aotfunc import aot_function, jit, vmap
from aotfunc.errors import CaptureError
from tests.reference import assert_same

P, Q = (
    torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64),
    torch.tensor([0.9, 0.4, 0.6], dtype=torch.float64),
)
M = torch.diag(P) + 1.0

# ----- distributions that validate their arguments -----------------------------------------------

DISTRIBUTIONS = {
    "Normal": (lambda p, q: D.Normal(p, q), P),
    "Normal of numbers": (lambda p, q: D.Normal(p, 2.0), P),
    "Uniform": (lambda p, q: D.Uniform(p - 1, q + 1), P),
    "Categorical": (lambda p, q: D.Categorical(probs=p), torch.tensor(1)),
    "Categorical of logits": (lambda p, q: D.Categorical(logits=p), torch.tensor(2)),
    "Bernoulli": (lambda p, q: D.Bernoulli(p), torch.ones_like(P)),
    "Beta": (lambda p, q: D.Beta(p, q), P),
    "Gamma": (lambda p, q: D.Gamma(p, q), P),
    "Dirichlet": (lambda p, q: D.Dirichlet(p), P / P.sum()),
    "Laplace": (lambda p, q: D.Laplace(p, q), P),
    "Poisson": (lambda p, q: D.Poisson(p), torch.ones_like(P)),
    "Geometric": (lambda p, q: D.Geometric(p), torch.ones_like(P)),
    "Binomial": (lambda p, q: D.Binomial(3, p), torch.ones_like(P)),
    "MultivariateNormal": (lambda p, q: D.MultivariateNormal(p, M), P),
    "Independent": (lambda p, q: D.Independent(D.Normal(p, q), 1), P),
    "LogNormal": (lambda p, q: D.LogNormal(p, q), P),
    "Mixture": (
        lambda p, q: D.MixtureSameFamily(D.Categorical(p), D.Normal(p, q)),
        torch.tensor(0.3).double(),
    ),
}


def asked(make, what, value):
    def f(p, q):
        d = make(p, q)
        if what == "kl_divergence":
            return D.kl_divergence(d, make(q, p))
        return d.log_prob(value) if what == "log_prob" else getattr(d, what)()

    return f


@pytest.mark.parametrize("what", ["log_prob", "rsample", "sample", "entropy", "kl_divergence"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(name, what):
    def run(f):
        torch.manual_seed(0)
        p, q = P.clone().requires_grad_(), Q.clone().requires_grad_()
        out = f(p, q)
        grads = (
            torch.autograd.grad(out.sum(), [p, q], allow_unused=True)
            if out.requires_grad
            else None
        )
        return out.detach(), grads

    f = asked(DISTRIBUTIONS[name][0], what, DISTRIBUTIONS[name][1])
    try:
        want = run(f)
    except NotImplementedError:
        pytest.skip("eager has none")
    compiled = jit(f)
    for _ in range(2):
        assert_same(run(compiled), want)


@pytest.fixture
def validation():
    """Switched on: Dynamo switches it off, for the whole process, where it is first used."""
    before = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(True)
    yield
    D.Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize(
    "way", [jit, lambda f: aot_function(f, "eager"), lambda f: jit(lambda s: jit(f)(s))]
)
def test_validation_happens_at_every_call(way):
    f = way(lambda scale: D.Normal(0.0, scale).log_prob(torch.ones(())))
    for good, bad in ((1.0, -1.0), (2.0, float("nan"))):
        s = torch.tensor(good)
        assert_same(f(s), D.Normal(0.0, s).log_prob(torch.ones(())))
        with pytest.raises(RuntimeError, match="scale of Normal"):
            f(torch.tensor(bad))


@pytest.mark.usefixtures("validation")
def test_validation_at_the_first_call_and_of_samples():
    with pytest.raises(RuntimeError, match="scale of Normal"):
        jit(lambda s: D.Normal(0.0, s).mean)(torch.tensor(-1.0))
    probability = jit(lambda v: D.Bernoulli(torch.tensor(0.5)).log_prob(v))
    probability(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="Bernoulli"):
        probability(torch.tensor(0.5))
    batched = vmap(jit(lambda s: D.Normal(0.0, s).log_prob(s)))
    batched(torch.ones(3))
    with pytest.raises(RuntimeError, match="scale of Normal"):
        batched(torch.tensor([1.0, -1.0]))


def test_validation_is_switched_off_and_on():
    f, bad = jit(lambda v: D.Bernoulli(torch.tensor(0.25)).log_prob(v)), torch.tensor(2.0)
    f(torch.tensor(1.0))
    try:
        D.Distribution.set_default_validate_args(False)
        assert_same(f(bad), D.Bernoulli(torch.tensor(0.25)).log_prob(bad))
    finally:
        D.Distribution.set_default_validate_args(True)
    with pytest.raises(RuntimeError, match="Bernoulli"):
        f(bad)


@pytest.mark.parametrize("way", [jit, lambda f: jit(vmap(f)), lambda f: vmap(jit(f))])
def test_a_loss_validates_at_every_call(way):
    def f(var):
        return torch.nn.functional.gaussian_nll_loss(
            torch.ones_like(var), torch.zeros_like(var), var
        )

    g, good = way(f), torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    for var in (good, good + 1):
        want = f(var) if way is jit else torch.stack([f(v) for v in var])
        assert_same(g(var), want)
    with pytest.raises(RuntimeError, match="var of gaussian_nll_loss is negative"):
        g(torch.tensor([[0.5, 2.0], [1.0, -3.0]]))


WINDOW = torch.hann_window(8, dtype=torch.float64)


def spectrum(window):
    return torch.stft(torch.arange(24.0).double(), 8, window=window, return_complex=True)


#: good arguments, and those for which eager raises
ASKED_IN_CPP = {
    "istft": (
        lambda w: spectrum(WINDOW).istft(8, window=w),
        (WINDOW,),
        (WINDOW * 0,),
    ),
    "fweights": (
        lambda n: torch.cov(M, fweights=n),
        (torch.tensor([1, 2, 1]),),
        (torch.tensor([1, 2, -1]),),
    ),
    "aweights": (lambda a: torch.cov(M, aweights=a), (P,), (-P,)),
    "both": (lambda n, a: M.cov(fweights=n, aweights=a), (torch.tensor([1, 0, 1]), P), None),
    "none": (lambda m: m.cov(), (M,), None),
    "corrcoef": (torch.corrcoef, (M,), None),
}


@pytest.mark.parametrize("name", ASKED_IN_CPP)
def test_what_torch_asks_of_values_in_cpp(name):
    f, good, bad = ASKED_IN_CPP[name]
    compiled = jit(f)
    for _ in range(2):
        torch.testing.assert_close(compiled(*good), f(*good))
        for g in (f, compiled) if bad is not None else ():
            with pytest.raises(RuntimeError, match=r"istft|cov"):
                g(*bad)
    with pytest.raises(CaptureError, match="a truth value"):  # a question of the user's own
        jit(lambda x: x if torch.equal(x.min() >= 0, x.new_ones((), dtype=torch.bool)) else -x)(P)


def test_a_distribution_made_outside():
    d = D.Normal(torch.zeros(3), torch.ones(3))
    f = jit(lambda x: d.log_prob(x))
    assert_same(f(P.float()), d.log_prob(P.float()))
    d.loc.add_(1)
    assert_same(f(P.float()), d.log_prob(P.float()))


# ----- layers and modes --------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("make, shape", [(nn.BatchNorm1d, (4, 3)), (nn.BatchNorm2d, (2, 3, 4, 4))])
def test_the_cumulative_average_of_batch_norm(make, shape, affine):
    def run(compiler):
        torch.manual_seed(0)
        net = make(3, momentum=None, affine=affine).double()
        f, found = compiler(net), []
        for mode in (True, True, False, True):
            net.train(mode)
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            out = f(x)
            found += [out.detach(), *torch.autograd.grad(out.square().sum(), x)]
            found += [
                net.running_mean.clone(),
                net.running_var.clone(),
                net.num_batches_tracked.clone(),
            ]
        return found

    assert_same(run(jit), run(lambda net: net))


def test_flops_of_the_first_call_and_later_ones():
    net = nn.Linear(3, 3)
    counts = []
    for f in (net, j := jit(net), j):
        with FlopCounterMode(display=False) as counter:
            f(torch.ones(2, 3, requires_grad=True)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


def test_torch_jit_trace_is_refused_in_words():
    f, x = jit(lambda x: x * 2), torch.ones(3)
    for _ in range(2):
        with pytest.raises(
            CaptureError, match=r"torch\.jit\.trace does not trace jit of .*__wrapped__"
        ):
            torch.jit.trace(f, (x,))
        assert_same(f(x), 2 * x)
    assert_same(torch.jit.trace(f.__wrapped__, (x,))(x), 2 * x)


INITS = {
    **{
        name: ()
        for name in (
            "normal_",
            "uniform_",
            "kaiming_normal_",
            "xavier_uniform_",
            "orthogonal_",
            "zeros_",
        )
    },
    **{"constant_": (2.0,), "sparse_": (0.5,), "eye_": ()},
}


@pytest.mark.parametrize("name", INITS)
def test_initialisation_inside(name):
    def f(w):
        return getattr(nn.init, name)(w, *INITS[name])

    want, got = torch.empty(3, 3), torch.empty(3, 3)
    torch.manual_seed(0)
    f(want)
    torch.manual_seed(0)
    assert jit(f)(got) is got
    assert_same(got, want)


# ----- functions of torch that the user exchanges ------------------------------------------------


@pytest.mark.parametrize(
    "owner, name, f",
    [
        (F, "relu", nn.ReLU()),
        (F, "linear", nn.Linear(3, 3)),
        (F, "layer_norm", nn.LayerNorm(3)),
        (F, "softmax", nn.Sequential(nn.Identity(), nn.Softmax(0))),
        (F, "linear", nn.MultiheadAttention(3, 1)),
        (F, "gelu", lambda x: F.gelu(x)),
        (torch, "softmax", lambda x: torch.softmax(x, 0)),
        (torch.Tensor, "relu", lambda x: x.relu()),
        (torch.Tensor, "doubled", lambda x: x.doubled()),
    ],
    ids=lambda x: getattr(x, "__name__", None) or (x if isinstance(x, str) else type(x).__name__),
)
def test_an_exchanged_function_is_seen(owner, name, f):
    call = (lambda x: f(x, x, x)[0]) if isinstance(f, nn.MultiheadAttention) else lambda x: f(x)
    x, g, before = torch.randn(3, 3), jit(call), owner.__dict__.get(name)
    if before is not None:
        assert_same(g(x).detach(), call(x).detach())
    try:
        for k in (2.0, 3.0):
            setattr(owner, name, lambda x, *_, **__: x * k)  # noqa: B023
            assert_same(g(x).detach(), call(x).detach())
    finally:
        setattr(owner, name, before) if before is not None else delattr(owner, name)
    if before is not None:
        assert_same(g(x).detach(), call(x).detach())
