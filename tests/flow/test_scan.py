"""``scan``: trees, layouts, aliases, draws and intent as in a Python loop; graphs that do not grow
with the number of steps; errors that say what differs."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import aotfunc
from aotfunc import backends, grad, hessian, jit, jvp, linearize, make_fx, scan, vmap
from aotfunc.debug import stages
from aotfunc.errors import ArgumentError, CaptureError, RuleError
from tests.reference import assert_same, grads, hess

W = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.8, -0.6], [-0.4, 0.2, 0.9]], dtype=torch.float64)
H = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
XS = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)


def by_loop(f, init, xs, reverse=False):
    carry, ys, rows = init, [], list(xs)
    for x in reversed(rows) if reverse else rows:
        carry, y = f(carry, x)
        ys.append(y)
    return carry, torch.stack(ys[::-1] if reverse else ys)


def same(f, *args, argnums=(0,)):
    """``f(loop, *args)`` gives what it gives with a Python loop, with first and second
    derivatives."""
    ours, reference = lambda *a: f(scan, *a), lambda *a: f(by_loop, *a)
    assert_same(ours(*args), reference(*args))
    leaves = [a.clone().requires_grad_() for a in args]
    found = []
    for run in (ours, reference):
        first = torch.autograd.grad(run(*leaves).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(
            sum(g.cos().sum() for g in first if g.requires_grad), leaves, allow_unused=True
        )
        found.append(
            (first, [torch.zeros_like(x) if g is None else g for g, x in zip(second, leaves)])
        )
    assert_same(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert_same(
        grad(lambda *a: ours(*a).sin().sum(), tuple(range(len(args))))(*args),
        found[1][0],
        rtol=1e-10,
        atol=1e-12,
    )


def test_trees_numbers_and_none():
    def step(carry, x):
        n = carry["n"] + 1  # in another order than in init
        carry = {"h": (carry["h"][0] + x["a"], carry["h"][1] * 2), "n": n}
        return carry, (None, [x["b"] * carry["n"]])

    init = {"n": 0, "h": (torch.zeros(2), 1.0)}
    carry, ys = scan(step, init, {"a": torch.ones(4, 2), "b": torch.arange(4)})
    assert_same(carry, {"n": torch.tensor(4), "h": (torch.full((2,), 4.0), torch.tensor(16.0))})
    assert_same(ys, (None, [torch.tensor([0, 2, 6, 12])]))


def test_without_xs():
    carry, ys = scan(lambda c, x: (c * 2, c if x is None else 0), torch.tensor(1), length=5)
    assert_same((carry, ys), (torch.tensor(32), torch.tensor([1, 2, 4, 8, 16])))


def test_no_steps():
    f = lambda c: scan(lambda c, x: (c * x, c + x), c, torch.zeros(0, 3))
    carry, ys = f(c := torch.ones(3))
    assert_same((carry, ys), (torch.ones(3), torch.zeros(0, 3)))
    assert carry.data_ptr() != c.data_ptr()
    assert_same(grad(lambda c: f(c)[0].sum())(c), torch.ones(3))
    assert_same(jvp(f, (c,), (c,))[1], (torch.ones(3), torch.zeros(0, 3)))


def test_more_steps_than_are_stacked_at_once():
    xs = torch.randn(600, 2, dtype=torch.float64)
    for reverse in (False, True):
        step = lambda c, x: (c * 0.9 + x.sin(), c * x)
        assert_same(
            scan(step, xs[0], xs, reverse=reverse), by_loop(step, xs[0], xs, reverse=reverse)
        )


LAYOUTS = {
    "transposed": lambda loop, h, xs: loop(
        lambda c, x: (c.t() * x.t() + 1, x @ c), h, xs.transpose(1, 2)
    ),
    "rows in the last dimension": lambda loop, h, xs: loop(
        lambda c, x: (c * x.view(-1).sum(), (c + x).t()), h, xs.movedim(0, -1).movedim(-1, 0)
    ),
    "a constant that is a view": lambda loop, h, xs: loop(
        lambda c, x: (c + h.t().reshape(-1)[:3], (c * h[:, 1]).view(3, 1) + x), h[0], xs
    ),
    "an expanded carry": lambda loop, h, xs: loop(
        lambda c, x: (x[:1].expand(3, 3), c * x), h[:, 0].expand(3, 3), xs
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    f = LAYOUTS[name]
    xs = torch.linspace(0, 1, 18, dtype=torch.float64).view(2, 3, 3)
    same(lambda loop, h, xs: (lambda c, y: c.sum() + y.sin())(*f(loop, h, xs)), W, xs)
    run = lambda loop: lambda h, xs: sum(map(torch.sum, f(loop, h, xs)))
    batch = torch.stack([W, W.t(), W * 2])
    for dims in ((0, None), (None, 1), (2, 0)):
        args = (
            W if dims[0] is None else batch,
            xs if dims[1] is None else torch.stack([xs] * 3, dims[1]),
        )
        got = vmap(grad(run(scan), (0, 1)), dims)(*args)
        assert_same(got, torch.func.vmap(torch.func.grad(run(by_loop), (0, 1)), dims)(*args))


def test_results_have_memory_of_their_own():
    h, same_h = torch.ones(2), lambda c, x: ((c[1], c[0], c[0]), c[0])
    carry, ys = scan(same_h, (h, h * 2, h), torch.zeros(3))
    assert len({t.untyped_storage().data_ptr() for t in (*carry, ys, h)}) == 5
    compiled = jit(lambda h: scan(same_h, (h, h * 2, h), torch.zeros(3)))
    assert_same(compiled(h), (carry, ys))
    carry[0].zero_()
    assert_same(h, torch.ones(2))


INTENT = {
    "detach": lambda c, x: (c * x.detach() + c.detach() ** 2, c * x),
    "no_grad": lambda c, x: ((c * x).sin() + no_grad_square(c), c * 2),
    "hidden write": lambda c, x: hidden_write(c * x),
    "checkpoint": lambda c, x: (
        checkpoint(lambda c: (c * x).sin(), c, use_reentrant=False),
        c * x,
    ),
    "a custom derivative": lambda c, x: (Twice.apply(c) * 0.3, Twice.apply(x * c)),
    "a gradient inside": lambda c, x: (inner_gradient(c, x), c.cos()),
    "a compiled function": lambda c, x: (jit(lambda c: (c * 0.5).sin())(c) + x, c * x),
    "a transform": lambda c, x: (grad(lambda c: (c * x).sin().sum())(c), vmap(torch.sin)(c)),
    "a loop": lambda c, x: scan(lambda d, r: (d * 0.5 + r * x.sum(), d * r), c, c),
}


#: the same for the Python loop, where it does not run outside of a capture
PLAIN = {
    "a gradient inside": lambda c, x: ((c * x).cos() * x + c, c.cos()),
    "a compiled function": lambda c, x: ((c * 0.5).sin() + x, c * x),
    "a transform": lambda c, x: ((c * x).cos() * x, c.sin()),
    "a loop": lambda c, x: by_loop(lambda d, r: (d * 0.5 + r * x.sum(), d * r), c, c),
}


def no_grad_square(c):
    with torch.no_grad():
        return c * c


def hidden_write(y):
    with torch.no_grad():
        y.mul_(3)
    return y, y * 2


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] * 2


def inner_gradient(c, x):
    [g] = torch.autograd.grad((c * x).sin().sum(), c, create_graph=True)
    return g + c


@pytest.mark.parametrize("name", INTENT)
def test_intent(name):
    h = torch.tensor([0.4, -0.3], dtype=torch.float64)
    xs = torch.tensor([[0.5, 0.7], [-0.2, 1.1], [0.3, 0.9]], dtype=torch.float64)
    plain = PLAIN.get(name, INTENT[name])

    def run(loop, h, xs):
        step = INTENT[name] if loop is scan else plain
        c, y = loop(step, h.sin(), xs * 2)
        return c + (y * y).sum()

    same(run, h, xs)


def test_closures_that_require_grad():
    w = W.clone().requires_grad_()
    f = lambda h: scan(lambda c, x: ((w @ c + x).tanh(), c), h, XS)[0].sum()
    (f(H) + grad(f)(H).sum()).backward()
    v = W.clone().requires_grad_()
    g = lambda h: by_loop(lambda c, x: ((v @ c + x).tanh(), c), h, XS)[0].sum()
    h = H.clone().requires_grad_()
    (g(h) + torch.autograd.grad(g(h), h, create_graph=True)[0].sum()).backward()
    assert_same(w.grad, v.grad, rtol=1e-12, atol=1e-12)


def test_draws():
    def run(loop):
        step = lambda c, x: ((c + torch.dropout(x, 0.5, True)).tanh(), c * torch.rand(3))
        return lambda h: sum(map(torch.sum, loop(step, h, XS.float())))

    h = H.float()
    for wrap in (grad, lambda f: jit(grad(f)), lambda f: grad(jit(f))):
        torch.manual_seed(3)
        got = wrap(run(scan))(h)
        torch.manual_seed(3)
        assert_same(got, torch.func.grad(run(by_loop))(h))
    ours = torch.Generator()
    drawn = lambda h: scan(lambda c, x: (c * torch.rand(3, generator=ours), c), h, length=2)[0]
    leaf = h.clone().requires_grad_()
    for f in (drawn, jit(drawn)):
        ours.manual_seed(1)
        out = f(leaf)
        out.sum().backward()
        assert_same(out, leaf * leaf.grad)
        leaf.grad = None
    with pytest.raises(RuleError, match=r"scan draws random numbers.*pass them"):
        aotfunc.jacrev(drawn)(h)
    draw = lambda h: scan(lambda c, x: (c + torch.rand(()), c), h, length=3)
    apart, shared = (vmap(draw, randomness=r)(torch.zeros(4))[0] for r in ("different", "same"))
    assert len(set(apart.tolist())) == 4 and len(set(shared.tolist())) == 1
    with pytest.raises(ArgumentError, match="draws random numbers"):
        vmap(draw)(torch.zeros(4))


def test_what_is_the_same_for_all_samples_is_computed_once():
    step = lambda c, x: ((c[0] + 1, c[1] * x), c[0])
    (count, _), ys = vmap(
        lambda x: scan(step, (torch.tensor(0), x[0]), x), out_dims=((None, 0), None)
    )(XS.t())
    assert count == 5 and ys.tolist() == [0, 1, 2, 3, 4]


def test_linearize_evaluates_once():
    f = lambda h: scan(lambda c, x: ((W @ c + x).tanh(), c.sin()), h, XS)
    out, push = linearize(f, H)
    assert_same(out, f(H))
    assert_same(push(H.cos()), jvp(f, (H,), (H.cos(),))[1])
    assert_same(grad(lambda t: push(t)[1].sum())(H), grad(lambda h: f(h)[1].sum())(H))


def test_torch_func_and_forward_ad_around_it():
    f = lambda h: scan(lambda c, x: ((c * x).tanh() + c, c.sin()), h, XS)[1].sum()
    over = lambda w: scan(lambda c, x: (c * w, c), H, XS)[0].sum()
    assert_same(torch.func.grad(over)(H), grad(over)(H))
    assert_same(torch.func.grad(f)(H), grad(f)(H))
    batch = torch.stack([H, H * 2])
    assert_same(torch.func.vmap(f)(batch), vmap(f)(batch))
    assert_same(torch.func.jvp(f, (H,), (H,)), jvp(f, (H,), (H,)))
    assert_same(
        torch.autograd.functional.jacobian(f, H, vectorize=True), grad(f)(H), rtol=1e-12, atol=0
    )


LINEAR = {
    "scan": lambda h: scan(lambda c, x: ((c[0] + 1, c[1] * x), c[0]), (0, h), XS)[0][1],
    "bounded while_loop": lambda h: aotfunc.while_loop(
        lambda c: c[1].sum() < 30,
        lambda c: (c[0] + 1, c[1] * 2),
        (torch.tensor(0), h),
        max_steps=9,
    )[1],
    "cond": lambda h: aotfunc.cond(h.sum() > 0, lambda h: h * 2, lambda h: h * 3, h),
    "map": lambda h: aotfunc.map(lambda x: (x * 2, x.floor()), h)[0],
    "cond of steps": lambda h: math.prod(
        aotfunc.cond(h.sum() > 0, lambda h: (h * 1, h.floor()), lambda h: (h * 3, h.ceil()), h)
    ),
    "cond of constants": lambda h: sum(
        aotfunc.cond(h.sum() > 0, lambda h: (h * 2, XS[0] * 1), lambda h: (h, XS[1] * 1), h)
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_second_tangents_of_torch_func_where_there_are_none(name):
    f = lambda h: LINEAR[name](h).sum()
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    assert_same(torch.func.jacfwd(f)(H), grad(f)(H))
    assert_same(torch.func.hessian(f)(H), zeros)
    assert_same(torch.func.jacfwd(torch.func.jacfwd(f))(H), zeros)
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(f(forward_ad.make_dual(H, XS[0]))).tangent
    assert_same(pushed, grad(f)(H) @ XS[0])
    cubed = lambda h: (LINEAR[name](h) ** 3).sum()
    assert_same(torch.func.hessian(cubed)(H), hessian(cubed)(H))


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 9])
def test_map(batch_size):
    f = lambda x: {"a": x["a"] * x["b"].sin(), "b": x["b"].sum()}
    xs = {"a": XS, "b": XS.cos()}
    run = lambda a: aotfunc.map(f, {"a": a, "b": XS.cos()}, batch_size)["a"].sin().sum()
    assert_same(aotfunc.map(f, xs, batch_size), vmap(f)(xs))
    assert_same(grad(run)(XS), (XS * XS.cos().sin()).cos() * XS.cos().sin(), rtol=1e-12, atol=0)
    with pytest.raises(ArgumentError, match=r"xs\['b'\] has 3 rows"):
        aotfunc.map(f, {"a": XS, "b": H}, batch_size)


# ----- graphs ------------------------------------------------------------------------------------


def net(h, xs):
    return scan(lambda c, x: ((W @ c + x).tanh(), c.sum()), h, xs)[1].sum()


def nodes(f, *args):
    def count(gm):
        inner = [m for m in gm.children() if isinstance(m, torch.fx.GraphModule)]
        return len(gm.graph.nodes) + sum(map(count, inner))

    return count(make_fx(f)(*args))


@pytest.mark.parametrize("f", [net, grad(net), hessian(net)])
def test_graphs_do_not_grow(f):
    batched = vmap(f, (0, None))
    stacks = [torch.zeros(t, 3, dtype=torch.float64) for t in (2, 7, 300)]
    assert len({nodes(f, H, xs) for xs in stacks}) == 1
    assert len({nodes(batched, torch.stack([H, H]), xs) for xs in stacks}) == 1


def test_bodies_are_compiled_once():
    compiled = []

    def compiler(gm, example_inputs):
        compiled.append(gm)
        return gm.forward

    f = jit(
        grad(lambda h, xs: scan(lambda c, x: (c * x.cos(), c), h, xs)[0].sum()), backend=compiler
    )
    for t in (2, 3, 50):
        f(H, torch.ones(t, 3, dtype=torch.float64))
    assert len(compiled) == 2  # forward and backward


def test_a_residual_is_stacked_where_it_varies():
    def f(w, h, xs):
        return scan(lambda c, x: (torch.tanh(w.exp() * c + x.cos()), None), h, xs)[0].sum()

    [*_, last] = stages(grad(f))(H, H, XS)
    _, forward, backward = last.code.split("\n\n# scan")
    assert "aten.exp" not in forward + backward  # it is computed before the loop
    assert "return (tanh, tanh, arg0)" in forward


def test_printed(request):
    gm = make_fx(lambda h, xs: scan(lambda c, x: (c * x, c.sin()), h, xs, reverse=True))(H, XS)
    assert (
        "aotfunc_api_operators_scan(scan_body, [], [h], [xs], length = 5, reverse = True)"
        in gm.code
    )
    assert "return (mul, sin)" in gm.scan_body.code
    assert_same(tuple(gm(H, XS)), tuple(scan(lambda c, x: (c * x, c.sin()), H, XS, reverse=True)))
    again = make_fx(vmap(gm, (0, None)))(torch.stack([H, H]), XS)
    assert_same(again(torch.stack([H, H]), XS)[0][1], gm(H, XS)[0])


@pytest.mark.parametrize("backend", ["eager", "cpp", "auto", lambda gm, example_inputs: gm])
@pytest.mark.parametrize(
    "partition", [aotfunc.default_partition, aotfunc.min_cut_rematerialization_partition]
)
def test_compiled_to_second_order(backend, partition):
    if backend in ("cpp", "auto") and not backends.auto.possible():
        pytest.skip("no compiler")

    def f(loop, w, h, xs):
        return loop(lambda c, x: ((w @ c + x).tanh(), c * x), h, xs)[1].sin().sum()

    compiled = aotfunc.aot_function(lambda *a: f(scan, *a), backend, partition_fn=partition)
    found = []
    for run in (compiled, lambda *a: f(by_loop, *a)):
        args = [a.clone().requires_grad_() for a in (W, H, XS)]
        first = torch.autograd.grad(run(*args), args, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), args)
        found.append((first, second))
    assert_same(*found, rtol=1e-10, atol=1e-12)


# ----- errors ------------------------------------------------------------------------------------

ERRORS = {
    "structure": (
        lambda: scan(lambda c, x: ((c, c), x), H, XS),
        ArgumentError,
        r"structure that it had: it got float64\[3\] and returned \(float64\[3\], float64\[3\]\)",
    ),
    "shape": (
        lambda: scan(lambda c, x: ({"a": x}, x), {"a": H[0]}, XS),
        ArgumentError,
        r"the carry\['a'\] must keep its shape and dtype: .* got float64\[\] and returned "
        r"float64\[3\]",
    ),
    "dtype": (
        lambda: scan(lambda c, x: (c + x, x), torch.zeros(3), XS),
        ArgumentError,
        r"got float32\[3\] and returned float64\[3\]",
    ),
    "number": (lambda: scan(lambda c, x: (1.0, x), H, XS), ArgumentError, "returned float"),
    "result": (lambda: scan(lambda c, x: c, H, XS), ArgumentError, r"must return \(carry, y\)"),
    "y": (
        lambda: scan(lambda c, x: (c, {"a": 2}), H, XS),
        ArgumentError,
        r"\['a'\] is of type int",
    ),
    "leaf": (
        lambda: scan(lambda c, x: (c, x), {"s": "no"}, XS),
        ArgumentError,
        r"init\['s'\] is of type str",
    ),
    "lengths": (
        lambda: scan(lambda c, x: (c, None), H, {"a": XS, "b": H}),
        ArgumentError,
        r"xs\['a'\] has 5 rows; xs\['b'\] has 3 rows",
    ),
    "no length": (lambda: scan(lambda c, x: (c, None), H), ArgumentError, "length="),
    "no rows": (lambda: scan(lambda c, x: (c, None), H, H[0]), ArgumentError, "no dimension"),
    "writes to its argument": (
        lambda: scan(lambda c, x: (c.add_(x), None), H, XS),
        CaptureError,
        "writes to its argument.*clone",
    ),
    "writes outside": (
        lambda: scan(lambda c, x: (c, W.add_(1)), H, XS),
        CaptureError,
        "writes to a tensor from outside",
    ),
    "asks": (
        lambda: scan(lambda c, x: (c * 2 if c.sum() > 0 else c, None), H, XS),
        CaptureError,
        "records its body once for all steps",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("wrap", [lambda f: f(), lambda f: jit(lambda x: f())(H)], ids=["", "jit"])
def test_errors(name, wrap):
    run, error, words = ERRORS[name]
    with pytest.raises(error, match=words) as e:
        wrap(run)
    assert "test_scan.py" in str(e.value)
    assert_same(W[0, 0], torch.tensor(0.5, dtype=torch.float64))


def kept(f, *args):
    """The shapes of what the first loop of a gradient returns."""
    nodes = make_fx(grad(f))(*args).graph.nodes
    return [list(v.shape) for n in nodes if n.name == "scan" for v in n.meta["val"]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 9])
def test_segments(length, reverse):
    """Values and two orders of derivatives, with steps left over, with and without rows."""

    def run(loop, h, xs):
        def step(carry, x):
            h, n = carry
            new = torch.tanh(W @ h + x) * h.sin()
            return (new, n + 1), new * n

        more = {"checkpoint": length, "unroll": 1 + length % 3} if loop is scan else {}
        (h, _), ys = loop(step, (h, torch.tensor(0)), xs, reverse=reverse, **more)
        return h.sum() + ys * xs

    same(run, H, XS, argnums=(0, 1))
    step = lambda h, _: (torch.sin(W @ h), {"y": h, "none": None})
    for loop in (scan, jit(scan, backend="eager")):
        found = loop(step, H, None, 7, reverse, checkpoint=length)
        assert_same(found, scan(step, H, None, 7, reverse))


@pytest.mark.parametrize(("unroll", "reverse"), [(2, False), (3, True), (5, False), (9, True)])
def test_unrolled(unroll, reverse):
    """Several steps in one body, with steps left over, draws in their order, under transforms."""

    def run(loop, h, xs):
        def step(carry, x):
            h, n = carry
            new = torch.tanh(W @ h + x) * h.sin()
            return (new, n + 1), new * n

        more = {"unroll": unroll} if loop is scan else {}
        (h, _), ys = loop(step, (h, torch.tensor(0)), xs, reverse=reverse, **more)
        return h.sum() + ys * xs

    same(run, H, XS)
    ours, plain = [lambda h, loop=loop: run(loop, h, XS).sin().sum() for loop in (scan, by_loop)]
    assert_same(jvp(ours, (H,), (H.cos(),))[1], grads(plain)(H) @ H.cos())
    assert_same(hessian(ours)(H), hess(plain, H))
    batch = torch.stack([H, H * 2])
    assert_same(vmap(grad(ours))(batch), torch.stack(list(map(grads(plain), batch))))
    assert_same(jit(grad(ours))(H), grads(plain)(H))
    step = lambda c, _: (c + torch.rand(()), c)
    found = []
    for k in (1, unroll):
        torch.manual_seed(1)
        found.append(scan(step, torch.zeros(()), None, 7, reverse, unroll=k))
    assert_same(*found)


def test_what_is_unrolled():
    f = lambda h, xs: scan(lambda c, x: (c * x, c.sin()), h, xs, unroll=2)
    code = make_fx(f)(H, XS).code
    assert "operators_scan(scan_body, [], [h], [view], length = 2, reverse = False)" in code
    assert code.count("aten.mul") == code.count("aten.cat") == 1  # the step that is left over
    assert "scan" not in make_fx(f)(H, XS[:2]).code


@pytest.mark.parametrize("unroll", [0, -1, 1.5, True, None])
def test_unroll_is_a_number_of_steps(unroll):
    with pytest.raises(ArgumentError, match="unroll must be a positive int"):
        scan(lambda h, x: (h, x), H, XS, unroll=unroll)


def test_what_checkpoints_keep():
    deep = lambda h, x: (torch.sin(torch.tanh(W @ h + x) * h.cos()), None)
    run = lambda step, **options: lambda h: scan(step, h, XS[:4], **options)[0].sum()
    assert kept(run(deep), H) == [[3], *[[4, 3]] * 4]
    assert kept(run(aotfunc.checkpoint(deep)), H) == kept(run(deep, checkpoint=1), H)
    assert kept(run(deep, checkpoint=1), H) == [[3], *[[4, 3]] * 2]
    assert kept(run(deep, checkpoint=2), H) == [[3], [2, 3]]


def test_branches_and_loops_inside_checkpoints():
    def run(loops, h, checkpoint):
        inner = lambda h: loops.while_loop(lambda h: h.abs().sum() > 0.9, lambda h: h * 0.7, h, 9)
        choice = lambda h: loops.cond(h[0] > 0, torch.sin, lambda h: torch.tanh(W @ h) * h, h)
        step = checkpoint(lambda h: choice(inner(h)))
        return step(step(h * 2) + 1).sum()

    python = SimpleNamespace(cond=branch_in_python, while_loop=while_in_python)
    reference = lambda h: run(python, h, lambda f: f)
    ours = lambda h: run(aotfunc, h, aotfunc.checkpoint)
    assert_same(grad(ours)(H), grads(reference)(H))
    assert_same(hessian(ours)(H), hess(reference, H))
    assert_same(jit(hessian(ours))(H), hess(reference, H))
    for around in (lambda h: ours(h), lambda h: checkpoint(ours, h, use_reentrant=False)):
        leaf = H.clone().requires_grad_()
        around(leaf).backward()
        assert_same(leaf.grad, grads(reference)(H))


def branch_in_python(yes, f, g, *operands):
    return f(*operands) if yes else g(*operands)


def while_in_python(condition, body, carry, most):
    while most and condition(carry):
        carry, most = body(carry), most - 1
    return carry


@pytest.mark.parametrize("checkpoint", [-1, 1.5, None, "dots"])
def test_a_checkpoint_is_a_number_of_steps(checkpoint):
    with pytest.raises(ArgumentError, match="checkpoint is a number of steps"):
        scan(lambda h, x: (h, x), H, XS, checkpoint=checkpoint)
