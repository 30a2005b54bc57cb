"""The vmap staticmethod of an autograd.Function: what it is given and may do on the real batch, as
with torch.func, and what it is refused where it is recorded."""

import threading

import pytest
import torch
from torch.autograd import Function

from aotfunc import custom_vmap, grad, grad_and_value, graph, jit, jvp, make_fx, scan, vjp, vmap
from aotfunc.capture import captured
from aotfunc.errors import AotfuncError, ArgumentError, CaptureError, LoopWarning, RuleError
from tests.functions import Twice
from tests.reference import assert_same

X = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 4.0, -2.0, 1.0], [5.0, 6.0, -7.0, 8.0]])
Y = torch.tensor([1.0, -2.0, 0.5, 3.0])
K = torch.tensor([2.0, -1.0, 0.25])


class Plain(Function):
    """A Function without a derivative; subclasses say forward and vmap."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def front(x, dim):
    return x.movedim(dim, 0)


# ----- trees -------------------------------------------------------------------------------------

seen: list = []


class Trees(Plain):
    @staticmethod
    def forward(pair, options, name):
        (a, [b]), by = pair, options["by"]
        return a * b * by, (a * by).sum()

    @staticmethod
    def vmap(info, in_dims, pair, options, name):
        seen.append((info.batch_size, info.randomness, in_dims, name, options["flag"]))
        (a, [b]), by = pair, options["by"]
        (da, [db]), dk = in_dims[0], in_dims[1]["by"]
        a = front(a, da) if da is not None else a.expand(info.batch_size, *a.shape)
        b = front(b, db) if db is not None else b
        by = by.reshape(-1, 1) if dk is not None else by
        return (a * b * by, (a * by).sum(1)), (0, 0)


TREES = {
    "a tuple": (
        lambda a, k: Trees.apply((a, [Y]), {"by": torch.tensor(2.0), "flag": True}, "n"),
        (0, 0),
    ),
    "a dict": (lambda a, k: Trees.apply((Y, [Y]), {"by": k, "flag": None}, "n"), (0, 0)),
    "both": (lambda a, k: Trees.apply((a, [a]), {"by": k, "flag": 3}, "n"), (0, 0)),
    "computed": (
        lambda a, k: Trees.apply((a.sin(), [Y.cos()]), {"by": k + 1, "flag": 3}, "n"),
        (0, 0),
    ),
    "not batched": (lambda a, k: Trees.apply((a, [Y]), {"by": k, "flag": 3}, "n"), (0, None)),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_of_arguments(name):
    f, dims = TREES[name]
    k = K if dims[1] == 0 else K[0]
    results = []
    for library in (torch.func.vmap, vmap):
        seen.clear()
        results.append((library(f, dims, randomness="same")(X, k), *seen))
    assert_same(results[1], results[0])
    want, again = results[0][0], lambda *xs: vmap(f, dims)(*xs)
    assert_same(jit(again)(X, k), want)  # recorded
    assert_same(make_fx(again)(X, k)(X, k), want)
    assert_same(
        vmap(again, (0, None))(torch.stack([X, X]), k), tuple(torch.stack([w, w]) for w in want)
    )


def test_trees_where_the_forward_needs_values():
    class Numpy(Plain):
        generate_vmap_rule = True

        @staticmethod
        def forward(pair, scale):
            return torch.from_numpy(pair[0].detach().numpy() * pair[1].numpy() * scale)

    f = lambda a: Numpy.apply((a, Y), 2)
    with pytest.warns(LoopWarning):
        assert_same(vmap(f)(X), X * Y * 2)
    assert_same(jit(f)(X[0]), X[0] * Y * 2)


# ----- results -----------------------------------------------------------------------------------


def results_of(output, out_dims, forward=None):
    class Results(Plain):
        @staticmethod
        def forward(x):
            return forward(x)

        @staticmethod
        def vmap(info, in_dims, x):
            return output(x), out_dims

    return Results.apply


RESULTS = {
    "none for two": (
        lambda x: (Y, Y + 1),
        None,
        lambda x: (Y * 1, Y + 1),
        (Y.expand(3, 4), (Y + 1).expand(3, 4)),
    ),
    "one for two": (
        lambda x: (x.sin(), x.cos()),
        0,
        lambda x: (x.sin(), x.cos()),
        (X.sin(), X.cos()),
    ),
    "each its own": (
        lambda x: (x.t(), Y),
        (1, None),
        lambda x: (x * 1, Y * 1),
        (X, Y.expand(3, 4)),
    ),
    "a tuple of one": (lambda x: (x * 2,), (0,), lambda x: (x * 2,), (X * 2,)),
    "negative": (lambda x: x.t(), -1, lambda x: x * 1, X),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_and_their_dims(name):
    output, out_dims, forward, want = RESULTS[name]
    f = results_of(output, out_dims, forward)
    assert_same(vmap(f)(X), want)
    if out_dims != -1:
        assert_same(torch.func.vmap(f)(X), want)
    if "Y" not in output.__code__.co_names:
        assert_same(jit(vmap(f))(X), want)
    assert_same(vmap(lambda x: (f(x), x)[0])(X), want)


def test_results_that_are_no_tensors():
    f = results_of(
        lambda x: (x * 2, "name", None), (0, None, None), lambda x: (x * 2, "name", None)
    )
    assert_same(vmap(f, out_dims=(0, None, None))(X), (X * 2, "name", None))
    assert_same(jit(lambda x: vmap(lambda x: f(x)[0])(x))(X), X * 2)
    nothing = results_of(lambda x: None, None, lambda x: None)
    assert vmap(lambda x: nothing(x), out_dims=None)(X) is None


WRONG = {
    "no pair": (lambda x: x, None, "must return .output, out_dims."),
    "structure": (lambda x: (x, x), (0, 0, 0), "structure"),
    "size": (lambda x: x[:2], 0, "3 samples at dimension 0"),
    "rank": (lambda x: x, 5, "3 samples at dimension 5"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("around", [lambda f: f, jit])
def test_wrong_results(name, around):
    output, out_dims, message = WRONG[name]

    class Wrong(Plain):
        @staticmethod
        def forward(x):
            return x * 1

        @staticmethod
        def vmap(info, in_dims, x):
            return output(x) if name == "no pair" else (output(x), out_dims)

    with pytest.raises(ArgumentError, match=f"Wrong.vmap.*{message}"):
        around(vmap(Wrong.apply))(X)


@pytest.mark.parametrize("around", [lambda f: f, jit, lambda f: grad(lambda x: f(x).sum())])
def test_two_rules_are_refused(around):
    class Both(Plain):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * 1

        @staticmethod
        def vmap(info, in_dims, x):
            return x * 1, 0

    with pytest.raises(RuntimeError, match="generate_vmap_rule"):
        torch.func.vmap(Both.apply)(X)
    with pytest.raises(
        RuleError, match=r"Both has a vmap staticmethod and generate_vmap_rule=True"
    ):
        around(vmap(Both.apply))(X)
    assert_same(jit(Both.apply)(X), X)


# ----- what it may do on the real batch ----------------------------------------------------------


def rule(body, forward=None):
    """A Function of one argument whose vmap is ``body(x)``, with x's batch in front."""

    class Ruled(Plain):
        calls = 0

        @staticmethod
        def forward(x):
            return x * 1 if forward is None else forward(x)

        @staticmethod
        def backward(ctx, g):
            return g

        @staticmethod
        def vmap(info, in_dims, x):
            Ruled.calls += 1
            return body(front(x, in_dims[0])), 0

    return Ruled


W = torch.tensor([1.0, 2.0, -3.0, 0.5], requires_grad=True)
OUT = (W * 2).exp()


def of_a_graph(x):
    """A row of the Jacobian of a graph from outside for each sample."""
    return torch.stack([torch.autograd.grad(OUT, W, g, retain_graph=True)[0] for g in x])


BODIES = {
    "closes over a tensor": lambda x: x * Y,
    "closes over a number": lambda x: x * torch.as_tensor(2.5),
    "looks at values": lambda x: x * 2 if x.sum() > 0 else x * 3,
    "looks at a number": lambda x: x * x.max().item(),
    "numpy": lambda x: torch.from_numpy(x.numpy() * 2),
    "transforms": lambda x: torch.func.vmap(torch.func.grad(lambda r: (r**3 * Y).sum()))(x),
    "our transforms": lambda x: vmap(grad(lambda r: (r**3 * Y).sum()))(x),
    "autograd": lambda x: (
        torch.autograd.grad((x.detach().requires_grad_() ** 2 * Y).sum(), [x])[0]
        if x.requires_grad
        else x * 2 * Y
    ),
    "a graph from outside": of_a_graph,
    "a function of theirs": lambda x: Twice.apply(x),
}


@pytest.mark.parametrize("name", BODIES)
def test_on_the_real_batch(name):
    F = rule(BODIES[name])
    program = lambda x, k: F.apply(F.apply(x.sin() * k).cos()) + x
    for x in (X, X + 1, X.double()[:2].float()):  # the program of the first is used again
        k = K[: len(x)]
        F.calls = 0
        got = vmap(program)(x, k)
        assert F.calls == 2
        assert_same(got, torch.func.vmap(program)(x, k))
    assert_same(vmap(F.apply, 1, 1)(X.t()), torch.func.vmap(F.apply, 1, 1)(X.t()))
    assert_same(vmap(F.apply, chunk_size=2)(X[:2]), torch.func.vmap(F.apply)(X[:2]))


def test_derivatives_of_what_it_closes_over():
    w = Y.clone().requires_grad_()
    F = rule(lambda x: (x * w).sin())
    for library in (torch.func.vmap, vmap):
        w.grad = None
        (library(lambda x: F.apply(x) * x)(X)).sum().backward()
        torch.testing.assert_close(w.grad, ((X * Y).cos() * X * X).sum(0))


def test_operands_that_require_grad_and_come_from_outside():
    w = Y.clone().requires_grad_()

    class Product(Plain):
        @staticmethod
        def forward(x, w):
            return x * w

        @staticmethod
        def vmap(info, in_dims, x, w):
            assert type(x) is type(w) or isinstance(w, torch.Tensor)
            assert float(x.sum()) == float(X.sum())
            return x * w, 0

    (got,) = torch.autograd.grad(vmap(lambda x: Product.apply(x, w))(X).sum(), w)
    torch.testing.assert_close(got, X.sum(0))


def test_gradients_off_stay_off():
    w = Y.clone().requires_grad_()
    F = rule(lambda x: x * w)
    with torch.no_grad():
        assert not vmap(F.apply)(X).requires_grad
    assert vmap(F.apply)(X).requires_grad


def test_writes_to_an_operand():
    class Exp(Function):
        @staticmethod
        def forward(x):
            return x.exp_()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.mark_dirty(inputs[0])

        @staticmethod
        def vmap(info, in_dims, x):
            assert x.sum() != 0
            return x.exp_(), in_dims[0]

    def f(x):
        before = x * 2
        y = Exp.apply(x)
        return before, y + 1, x * 3

    x = X.clone()
    assert_same(vmap(f)(x), (X * 2, X.exp() + 1, X.exp() * 3))
    torch.testing.assert_close(x, X.exp())
    assert_same(vmap(lambda x: f(x * 1.0))(X), (X * 2, X.exp() + 1, X.exp() * 3))


def test_writes_to_what_was_read():
    total = torch.zeros(4)
    F = rule(lambda x: (total.add_(1), x + total)[1])
    assert_same(vmap(lambda x: F.apply(x) + F.apply(x))(X), X + 1 + X + 2)
    with pytest.raises(CaptureError, match=r"Ruled.vmap writes to a tensor .*clone"):
        vmap(lambda x: F.apply(x * total))(X)


def test_writes_from_before_are_not_overlooked():
    total = torch.zeros(4)
    F = rule(lambda x: x + total)

    def f(x):
        total.add_(1)
        return F.apply(x)

    with pytest.raises(CaptureError, match=r"Ruled.vmap is recorded here.*closes over"):
        vmap(f)(X)
    assert not total.any()


def test_draws_before_it_are_not_drawn_again():
    F = rule(lambda x: x * 2)

    def f(x):
        mask = torch.rand(4)
        return mask, F.apply(mask + 0 * x)

    mask, twice = vmap(f, randomness="different")(X)
    torch.testing.assert_close(twice, 2 * mask)


def test_an_empty_batch():
    F = rule(lambda x: x * Y)
    assert vmap(F.apply)(torch.zeros(0, 4)).shape == (0, 4)


# ----- where it is recorded ----------------------------------------------------------------------

AROUND = {
    "jit": jit,
    "grad": lambda f: grad(lambda x: f(x).sum()),
    "vmap": lambda f: lambda x: vmap(f)(x[None]),
    "make_fx": lambda f: lambda x: make_fx(f)(x)(x),
    "requires grad": lambda f: lambda x: f(x.clone().requires_grad_()),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    "name", ["closes over a tensor", "closes over a number", "looks at values", "numpy"]
)
def test_refusals(name, around):
    F = rule({**BODIES, "closes over a number": lambda x: x * K[0]}[name])
    with pytest.raises(
        AotfuncError, match=r"Ruled.vmap is recorded here.*arguments of Ruled.apply"
    ) as e:
        AROUND[around](vmap(F.apply))(X)
    assert "test_function_vmap_rules.py" in str(e.value)


@pytest.mark.parametrize("around", AROUND)
def test_a_rule_that_can_be_recorded(around):
    F = rule(lambda x: x.sin() * torch.tensor(2.0), lambda x: x.sin() * 2)
    got = AROUND[around](vmap(F.apply))(X)
    want = {"grad": 2 * X.cos(), "vmap": (X.sin() * 2)[None]}.get(around, X.sin() * 2)
    assert_same(got, want)


class Scaled(Function):
    """x times a number that the class keeps; the rule adds it a hundred times to each batch."""

    by = 2.0

    @staticmethod
    def forward(x):
        return x * Scaled.by

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g * Scaled.by

    @staticmethod
    def vmap(info, in_dims, x):
        return Scaled.apply(x) + 100 * Scaled.by, in_dims[0]


@custom_vmap
def scaled(x):
    return x * Scaled.by


scaled.def_vmap(lambda size, batched, x: (x * Scaled.by + 100 * Scaled.by, batched[0]))

RECORDED = {
    "grad": lambda f: grad(lambda x: f(x).square().sum())(X[0]),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).square().sum()))(X),
    "vmap of vmap": lambda f: vmap(vmap(f))(X),
    "vmap of grad of a vmap": lambda f: vmap(grad(lambda x: vmap(f)(x).square().sum()))(X),
}


@pytest.mark.parametrize("f", [Scaled.apply, scaled], ids=["Function", "custom_vmap"])
@pytest.mark.parametrize("name", RECORDED)
def test_a_rule_that_records_the_same_is_one_program(name, f, monkeypatch):
    call, results = RECORDED[name], {}
    for by in (2.0, 3.0, 2.0):
        monkeypatch.setattr(Scaled, "by", by)
        results.setdefault(by, []).append(call(f))
        known = len(captured._programs), len(graph._derived)
        results[by].append(call(f))
        assert (len(captured._programs), len(graph._derived)) == known
    for found in results.values():
        for x in found[1:]:
            assert_same(x, found[0])
    assert not torch.equal(results[2.0][0], results[3.0][0])


STATE = {"k": 1.0}


class Read(Function):
    """The identity, whose batching rule multiplies by what a dictionary says."""

    @staticmethod
    def forward(x):
        return x * 1.0

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def vmap(info, in_dims, x):
        STATE["calls"] = STATE.get("calls", 0) + 1
        return x * STATE["k"], in_dims[0]


read = custom_vmap(lambda x: x * 1.0)
read.def_vmap(lambda size, batched, x: Read.vmap(None, batched, x))


def read_twice(f, x, layout=lambda x: x):
    STATE["k"] = 2.0
    a = f(layout(x))
    STATE["k"] = 3.0
    return a - f(layout(x * 1))


WHEN = {
    "between two vmaps": lambda f: jvp(lambda x: read_twice(vmap(f), x), (X,), (X,))[0],
    "in a vmap": lambda f: vjp(vmap(lambda r: read_twice(f, r)), X)[0],
    "in a vmap in jit": lambda f: jit(vmap(lambda r: read_twice(f, r)))(X),
    "in jit in a vmap": lambda f: vmap(jit(lambda r: read_twice(f, r)))(X),
    "in grad in a vmap": lambda f: vmap(grad_and_value(lambda r: read_twice(f, r).sum()))(X)[1],
    "in two vmaps": lambda f: vmap(vmap(lambda r: read_twice(f, r)))(X[None]),
    "a batch behind": lambda f: make_fx(vmap(lambda r: read_twice(f, r), 1))(X)(X),
    "another layout": lambda f: jit(vmap(lambda r: read_twice(f, r.view(3, 1), torch.t), 1))(X),
    "written to": lambda f: jit(
        vmap(lambda r: read_twice(f, r, lambda x: torch.zeros(4)[None].view(4).copy_(x)))
    )(X),
}


@pytest.mark.parametrize("f", [Read.apply, read], ids=["Function", "custom_vmap"])
@pytest.mark.parametrize("name", WHEN)
def test_a_rule_reads_what_is_so_where_it_is_applied(name, f):
    for _ in range(2):
        torch.testing.assert_close(WHEN[name](f).sum(), -X.sum())


def test_a_rule_runs_once_each_time_it_is_applied():
    f = grad_and_value(lambda x: vmap(lambda r: Read.apply(r).sum())(x).sum())
    for k in (1.0, 1.0, 2.0, 2.0, 1.0):
        STATE["k"], before = k, STATE.get("calls", 0)
        torch.testing.assert_close(f(X)[1], X.sum() * k)
        assert STATE["calls"] == before + 1


def test_a_rule_reads_what_is_so_in_its_thread():
    local, wrong = threading.local(), []
    F = rule(lambda x: x * local.k, lambda x: x)

    def work(k):
        local.k = k
        for _ in range(15):
            got = grad_and_value(lambda x: vmap(F.apply)(x).sum())(X)[1]
            if not torch.allclose(got, X.sum() * k):
                wrong.append((k, got))

    threads = [threading.Thread(target=work, args=(float(k),)) for k in (2, 3, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_late_rule_whose_state_has_changed_is_refused():
    """A loop's carry that is batched after the first step only is not told to be in the body."""

    class Product(Plain):
        @staticmethod
        def forward(c, x):
            return c * x

        @staticmethod
        def vmap(info, in_dims, c, x):
            return c * x * STATE["k"], 0

    def body(c, x):
        return read_twice(lambda c: Product.apply(c, x), c), x

    f = vmap(lambda r: scan(body, torch.ones(4), r.expand(3, 4))[0])
    with pytest.raises(CaptureError, match=r"Product.*what it reads has changed since"):
        jit(f)(X)


def test_a_rule_in_any_layout_reads_what_is_so_where_it_is_applied():
    """The batch is innermost in memory and each sample transposed."""
    x = torch.arange(24.0).view(4, 2, 3)
    F = rule(lambda x: x * STATE["k"], lambda x: x * 1.0)
    f = vmap(lambda r: read_twice(F.apply, r, lambda x: x.t() * 1), 2)
    torch.testing.assert_close(jit(f)(x), -x.permute(2, 1, 0))


def test_a_rule_that_closes_over_tensors_is_found_again():
    w = torch.rand(4)
    f = custom_vmap(lambda x: x * w)
    f.def_vmap(lambda size, batched, x: (x * w, batched[0]))
    call = grad(lambda x: vmap(f)(x).sin().sum())
    first = call(X)
    known = len(captured._programs), len(graph._derived)
    for _ in range(3):
        assert_same(call(X), first)
    assert (len(captured._programs), len(graph._derived)) == known
    w = torch.rand(4)
    torch.testing.assert_close(call(X), (X * w).cos() * w)


NUMBERS = {
    "a vector": lambda: torch.tensor([2.0, -1.0, 0.5, 1.0]),
    "a matrix": lambda: torch.tensor([[2.0], [0.5], [-3.0]]),
    "integers": lambda: torch.tensor([[2, 3, 4, 5]], dtype=torch.int32),
    "booleans": lambda: torch.tensor([True, False, True, True]),
    "infinities": lambda: torch.tensor([1.0, float("inf"), -float("inf"), 2.0]),
    "none": lambda: torch.tensor([]).sum() + torch.tensor([1.5]),
    "written to": lambda: torch.tensor([1.0, 2.0, 3.0, 4.0]).index_fill_(
        0, torch.tensor([1]), 7.0
    ),
    "a number of Python's": lambda: torch.tensor([STATE["k"]] * 4),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_recorded_rule_may_make_tensors_of_numbers(name):
    F = rule(lambda x: x * NUMBERS[name](), lambda x: x * 1.0)
    f = grad_and_value(lambda x: vmap(F.apply)(x).sin().sum())
    for k in (2.0, 3.0, 3.0):
        STATE["k"] = k
        x = X.clone().requires_grad_()
        y = (x * NUMBERS[name]()).sin().sum()
        assert_same(f(X), (*torch.autograd.grad(y, x), y.detach()))
    if name != "written to":
        known = len(captured._programs), len(graph._derived)
        f(X)
        assert (len(captured._programs), len(graph._derived)) == known


def test_a_recorded_rule_may_not_make_long_tensors_of_numbers():
    F = rule(lambda x: x * torch.tensor([1.0] * 65).sum(), lambda x: x * 1.0)
    with pytest.raises(CaptureError, match=r"of shape \(65,\) of Python numbers"):
        grad(lambda x: vmap(F.apply)(x).sum())(X)


# ----- a graph from outside, inside --------------------------------------------------------------


def test_a_gradient_through_a_rule_is_refused():
    w = Y.clone().requires_grad_()
    F = rule(lambda x: x * w)
    with pytest.raises(CaptureError, match="computed there from one that is differentiated"):
        vmap(lambda x: torch.autograd.grad((F.apply(x) * w).sum(), w)[0])(X)


def test_the_gramian_of_an_autograd_graph():
    """Hooks put a Function into a graph from outside; its backward calls another, whose vmap makes
    a Gramian of all rows of the Jacobian: the engine of torchjd in small."""
    torch.manual_seed(0)
    net, x = (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)),
        torch.randn(5, 3),
    )

    def gramian(library):
        found, busy = [], []

        class Accumulate(Plain):
            @staticmethod
            def forward(module, inputs, g):
                return None

            @staticmethod
            def vmap(info, in_dims, module, inputs, g):
                assert in_dims == (None, [None], 0) and inputs[0].shape == (5, module.in_features)
                parameters = {k: p.detach() for k, p in module.named_parameters()}

                def of_one(x, g):
                    f = lambda p: torch.func.functional_call(module, p, (x,))
                    return torch.func.vjp(f, parameters)[1](g)[0]

                busy.append(module)
                rows = library(library(of_one), (None, 0))(
                    inputs[0].detach(), front(g, 0)
                ).values()
                busy.pop()
                jacobian = torch.cat([r.sum(1).flatten(1) for r in rows], 1)
                found.append(jacobian @ jacobian.T)
                return None, None

        class Node(Function):
            @staticmethod
            def forward(ctx, module, inputs, out):
                ctx.call = module, inputs
                return out.detach()

            @staticmethod
            def backward(ctx, g):
                Accumulate.apply(*ctx.call, g)
                return None, None, g

        def hook(module, inputs, out):
            return out if busy else Node.apply(module, [*inputs], out)

        handles = [m.register_forward_hook(hook) for m in (net[0], net[2])]
        out, leaves = net(x).sum(1), [*net.parameters()]
        rows = library(lambda g: torch.autograd.grad(out, leaves, g, retain_graph=True))(
            torch.eye(5)
        )
        for handle in handles:
            handle.remove()
        return sum(found), torch.cat([r.flatten(1) for r in rows], 1)

    got, jacobian = gramian(vmap)
    assert_same(got, jacobian @ jacobian.T, atol=1e-5, rtol=1e-4)
    want = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(net(r).sum(), [*net.parameters()])]
            )
            for r in x
        ]
    )
    assert_same(jacobian, want, atol=1e-5, rtol=1e-4)


class Counting(torch.autograd.Function):
    """A sine whose backward counts its calls."""

    generate_vmap_rule = True
    calls = 0

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, ct):
        Counting.calls += 1
        return 2 * ct * ctx.saved_tensors[0].cos()


def sine_of_weight(w, x):
    return vmap(lambda y: Counting.apply(w) * y)(x).sum()


def gradient_within(x):
    def f(y):
        z = y.detach().requires_grad_()
        return torch.autograd.grad(Counting.apply(z).sum(), z)[0]

    return vmap(f)(x)


def by_backward(x):
    x = x.clone().requires_grad_()
    vmap(Counting.apply)(x).sum().backward()
    return x.grad


#: gradients that are taken through a batch, of sum(f(x))
THROUGH = {
    "grad": lambda x: grad(lambda x: vmap(Counting.apply)(x).sum())(x),
    "torch.func.grad": lambda x: torch.func.grad(lambda x: vmap(Counting.apply)(x).sum())(x),
    "vmap and grad of theirs": lambda x: torch.func.vmap(
        torch.func.grad(lambda x: vmap(Counting.apply)(x[None]).sum())
    )(x),
    "backward": by_backward,
    "grad inside": lambda x: vmap(grad(Counting.apply))(x),
    "autograd.grad inside": gradient_within,
    "closed over": lambda x: grad(lambda w: sine_of_weight(w, torch.ones(1)))(x[0]) + 0 * x,
    "jit": lambda x: grad(lambda x: jit(vmap(Counting.apply))(x).sum())(x),
}


@pytest.mark.parametrize("name", THROUGH)
def test_a_backward_is_called_where_a_gradient_is_taken(name):
    x = torch.full((3,), 0.3)
    vmap(Counting.apply)(x)  # what it has made must not be taken
    got = THROUGH[name](x)
    torch.testing.assert_close(got, 2 * x.cos())


def test_a_backward_is_not_called_where_none_is():
    x, w = torch.full((3,), 0.3), torch.ones(3, requires_grad=True)
    Counting.calls = 0
    assert_same(vmap(Counting.apply)(x), x.sin())
    with torch.no_grad():
        vmap(Counting.apply)(w)
    assert not Counting.calls
    out = vmap(lambda y: Counting.apply(y) * w)(x)
    assert out.requires_grad and not Counting.calls
