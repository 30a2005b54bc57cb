"""What loops are for, each against a result that is computed in another way: a recurrent network,
an ordinary differential equation, a Kalman filter, a Viterbi decoder, optimal transport, an
implicit layer."""

import itertools
import math

import torch

from aotfunc import associative_scan, grad, hessian, jit, map, scan, vmap, while_loop
from tests.reference import assert_same

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_a_recurrent_network_is_torchs():
    net = torch.nn.RNN(3, 4, dtype=DOUBLE)
    p = dict(net.named_parameters())

    def ours(p, x):
        def step(h, x):
            h = torch.tanh(
                p["weight_ih_l0"] @ x + p["bias_ih_l0"] + p["weight_hh_l0"] @ h + p["bias_hh_l0"]
            )
            return h, h

        return scan(step, x.new_zeros(4), x)[1]

    xs = randn(2, 6, 3)  # two sequences
    out = net(xs.transpose(0, 1))[0].transpose(0, 1)
    assert_same(vmap(ours, (None, 0))(p, xs), out, **TIGHT)
    loss = lambda p: vmap(ours, (None, 0))(p, xs).sin().sum()
    expected = torch.autograd.grad(out.sin().sum(), list(p.values()))
    assert_same(list(grad(loss)(p).values()), list(expected), **TIGHT)
    assert_same(list(jit(grad(loss))(p).values()), list(expected), **TIGHT)


def test_a_linear_differential_equation():
    """Runge and Kutta's method against the exponential of the matrix, and its gradient."""
    a, y, dt = randn(3, 3) * 0.5, randn(3, seed=1), 0.01

    def solved(a, y):
        def step(y, _):
            k1 = a @ y
            k2 = a @ (y + dt / 2 * k1)
            k3 = a @ (y + dt / 2 * k2)
            k4 = a @ (y + dt * k3)
            return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        return scan(step, y, length=100)[0]

    exact = lambda a, y: torch.linalg.matrix_exp(a) @ y
    assert_same(solved(a, y), exact(a, y), rtol=1e-8, atol=1e-8)
    loss = lambda f: lambda a, y: f(a, y).sin().sum()
    for wrap in (lambda f: f, jit):
        got = wrap(grad(loss(solved), (0, 1)))(a, y)
        assert_same(got, torch.func.grad(loss(exact), (0, 1))(a, y), rtol=1e-7, atol=1e-7)
    second = torch.func.hessian(loss(exact), 1)(a, y)
    assert_same(hessian(loss(solved), 1)(a, y), second, rtol=1e-6, atol=1e-6)


def test_a_kalman_filter_has_the_likelihood_of_all_observations_at_once():
    steps, f, q, r = 5, randn(2, 2) * 0.6, torch.eye(2, dtype=DOUBLE) * 0.3, 0.2
    h, ys = randn(2, seed=1), randn(steps, seed=2)

    def filtered(f, ys):
        def step(carry, y):
            m, p = carry
            m, p = f @ m, f @ p @ f.T + q
            s = h @ p @ h + r
            gain, off = p @ h / s, y - h @ m
            likelihood = -0.5 * (off * off / s + s.log() + math.log(2 * math.pi))
            return (m + gain * off, p - torch.outer(gain, gain) * s), likelihood

        start = torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE)
        return scan(step, start, ys)[1].sum()

    def at_once(f, ys):
        """The normal distribution of all observations, by the covariances of the states."""
        p, each = torch.eye(2, dtype=DOUBLE), []
        for _ in range(steps):
            p = f @ p @ f.T + q
            each.append(p)
        power = torch.linalg.matrix_power
        rows = [
            [h @ power(f, j - i) @ each[i] @ h if i <= j else None for j in range(steps)]
            for i in range(steps)
        ]
        full = [rows[min(i, j)][max(i, j)] for i in range(steps) for j in range(steps)]
        cov = torch.stack(full).view(steps, steps) + r * torch.eye(steps, dtype=DOUBLE)
        return torch.distributions.MultivariateNormal(torch.zeros_like(ys), cov).log_prob(ys)

    assert_same(filtered(f, ys), at_once(f, ys), **TIGHT)
    leaf = f.clone().requires_grad_()
    expected = torch.autograd.grad(at_once(leaf, ys), leaf)[0]
    assert_same(grad(filtered)(f, ys), expected, **TIGHT)
    assert_same(jit(grad(filtered))(f, ys), expected, **TIGHT)
    batch = randn(3, steps, seed=3)
    assert_same(
        vmap(filtered, (None, 0))(f, batch), torch.stack([at_once(f, y) for y in batch]), **TIGHT
    )


def test_viterbi_finds_the_best_of_all_paths():
    states, steps = 3, 5
    score, emit = randn(states, states), randn(steps, states, seed=1)

    def best(score, emit):
        def ahead(v, e):
            found = (v[:, None] + score).max(0)
            return found.values + e, found.indices

        last, back = scan(ahead, emit[0], emit[1:])
        end = last.argmax()
        _, path = scan(lambda s, row: (row[s], row[s]), end, back, reverse=True)
        return last.max(), torch.cat([path, end.view(1)])

    def value(path):
        ways = itertools.pairwise(path)
        return sum(emit[t, s] for t, s in enumerate(path)) + sum(score[i, j] for i, j in ways)

    paths = list(itertools.product(range(states), repeat=steps))
    expected = max(paths, key=value)
    total, path = best(score, emit)
    assert tuple(path.tolist()) == expected
    assert_same(total, value(expected), **TIGHT)
    # the gradient says how often the best path takes each way
    counts = torch.zeros(states, states, dtype=DOUBLE)
    for i, j in itertools.pairwise(expected):
        counts[i, j] += 1
    assert_same(grad(lambda s: best(s, emit)[0])(score), counts)
    # the sum over all paths, by an associative scan of matrices
    ways = torch.cat([emit[:1, None].expand(1, states, states), score + emit[1:, None]])
    product = lambda a, b: torch.logsumexp(a[:, :, None] + b[None], 1)
    total = torch.logsumexp(associative_scan(product, ways)[-1][0], 0)
    assert_same(total, torch.stack([value(p) for p in paths]).logsumexp(0), **TIGHT)


def test_optimal_transport():
    """Sinkhorn's iteration: the marginals, and the envelope theorem's gradient, which is the plan
    itself."""
    cost, a = randn(4, 5).square(), torch.full((4,), 0.25, dtype=DOUBLE)
    b, eps = torch.softmax(randn(5, seed=1), 0), 0.3

    def potentials(cost):
        def step(c):
            _, g, _ = c
            f = eps * (a.log() - ((g - cost) / eps).logsumexp(1))
            new = eps * (b.log() - ((f[:, None] - cost) / eps).logsumexp(0))
            return f, new, (new - g).abs().max()

        start = torch.zeros_like(a), torch.zeros_like(b), torch.ones((), dtype=DOUBLE)
        return while_loop(lambda c: c[2] > 1e-13, step, start, max_steps=400)[:2]

    def value(cost):
        f, g = potentials(cost)
        return f @ a + g @ b

    f, g = potentials(cost)
    plan = ((f[:, None] + g - cost) / eps).exp()
    assert_same((plan.sum(1), plan.sum(0)), (a, b), rtol=1e-9, atol=1e-10)
    assert_same(grad(value)(cost), plan, rtol=1e-6, atol=1e-8)
    assert_same(jit(grad(value))(cost), plan, rtol=1e-6, atol=1e-8)


def test_an_implicit_layer():
    """The fixed point ``z = tanh(w @ z + x)``: its derivative by the loop against that by the
    implicit function theorem."""
    w, x = randn(3, 3) * 0.3, randn(3, seed=1)

    def fixed(w, x, most=None):
        far = lambda c: (c[0] - c[1]).norm() > 1e-13
        step = lambda c: (torch.tanh(w @ c[0] + x), c[0])
        return while_loop(far, step, (torch.zeros_like(x), torch.ones_like(x)), most)[0]

    z = fixed(w, x)
    assert_same(z, torch.tanh(w @ z + x), **TIGHT)
    slope = torch.diag(1 - z * z)
    jac = torch.linalg.solve(torch.eye(3, dtype=DOUBLE) - slope @ w, slope)
    assert_same(grad(lambda x: fixed(w, x).sum())(x), jac.sum(0), rtol=1e-8, atol=1e-9)
    batch = randn(4, 3, seed=2)
    one = map(grad(lambda x: fixed(w, x, 64).sum()), batch)
    assert_same(vmap(grad(lambda x: fixed(w, x).sum()))(batch), one, rtol=1e-8, atol=1e-9)
