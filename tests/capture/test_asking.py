"""f asks for numbers, prints, leaks values: served on concrete inputs, else an error with the
user's line."""

import pytest
import torch

import aotfunc
from aotfunc import grad, jacrev, jit, jvp, make_fx, vjp, vmap
from aotfunc.capture import concretize, followed
from aotfunc.errors import AotfuncError
from aotfunc.trace import replay
from tests.inputs import f64
from tests.reference import assert_same, grads, loop

# numbers
# -------------------------------------------------------------------------------------------------


def by_item(x):
    return x * x.sum().item()


def by_float(x):
    return x * float(x[0]) + int(x[1] * 10)


def by_branch(x):
    return x * 2 if x.sum() > 0 else x.sin()


def by_and(x):
    return x * 2 if (x > -100).all() and not bool(x.max() > 100) else x


def by_loop(x):
    while x.abs().max() > 0.1:
        x = x / 2
    return x


def by_tolist(x):
    return x * sum(x.tolist())


def by_comparison_of_two(x):
    return x if torch.equal(x, x * 1) and torch.allclose(x, x) else x * 0


def by_an_iteration(x):
    return sum(v * i for i, v in enumerate(x))


def by_max_and_min(x):
    return max(x[0], x[1]) * min(x[1], x[2])


def by_index(x):
    return x[int(x.argmax())] * x


def by_format(x):
    return x * float(f"{x[0].item():.3f}")


def by_numpy_of_a_constant(x):
    return x * torch.arange(3.0).numpy().sum().item()


ASKING = [
    by_item,
    by_float,
    by_branch,
    by_and,
    by_loop,
    by_tolist,
    by_comparison_of_two,
    by_max_and_min,
    by_index,
    by_format,
]
asking = pytest.mark.parametrize("f", ASKING, ids=lambda f: f.__name__)
never = pytest.mark.parametrize(
    "f", [by_an_iteration, by_numpy_of_a_constant], ids=lambda f: f.__name__
)


@asking
def test_concrete_inputs_serve(f):
    for sign in (1, -1):
        x = sign * f64(3).abs()
        assert_same(make_fx(f)(x)(x), f(x))
        assert_same(grad(lambda x: f(x).sum())(x), grads(lambda x: f(x).sum())(x))
        out, pull = vjp(f, x)
        assert_same(out, f(x))
        assert_same(pull(torch.ones_like(out))[0], grads(lambda x: f(x).sum())(x))


@asking
def test_forward_mode_and_jacobians(f):
    x = f64(3)
    expected = torch.autograd.functional.jacobian(f, x)
    assert_same(jvp(f, (x,), (torch.ones_like(x),))[1], expected.sum(-1))
    assert_same(jacrev(f)(x), expected)


@asking
def test_vmap_answers_where_the_samples_agree_and_else_names_the_line(f):
    x = f64(3)
    same = x.expand(4, 3)
    assert_same(vmap(f)(same), f(x).expand(4, *f(x).shape))
    mixed = torch.tensor(
        [[1.0, 2.0, 0.3], [-1.0, -2.0, 0.2], [9.0, 0.5, 0.1]], dtype=torch.float64
    )
    try:
        out = vmap(f)(mixed)
    except AotfuncError as error:
        assert "test_asking.py" in str(error) and "samples" in str(error)
        assert f not in (by_and, by_comparison_of_two)
    else:
        assert_same(out, loop(f)(mixed))


@asking
def test_jit_says_so_with_the_line(f):
    with pytest.raises(AotfuncError, match=r"test_asking\.py"):
        jit(f)(f64(3))


@asking
def test_inside_vmap_of_a_closed_over_tensor(f):
    """An unbatched concrete tensor may be asked even under vmap."""
    w = f64(3).abs()
    x = f64(4, 3)
    assert_same(vmap(lambda x: x * f(w))(x), x * f(w))


@never
def test_asks_for_nothing(f):
    x = f64(3)
    assert_same(make_fx(f)(x)(x), f(x))
    assert_same(jit(f)(x), f(x))


def test_f_does_not_run_again():
    seen = []

    def f(x):
        seen.append("start")
        y = x * 2
        if y.sum() > -1e9:
            y = y * 3
        seen.append(y.sum().item())
        return (y * x).sum()

    x = f64(3)
    assert_same(grad(f)(x), 12 * x)
    assert seen == ["start", float((6 * x).sum())]


def test_asking_leaves_writes_and_random_numbers_as_they_are():
    def f(x):
        x.mul_(2)
        noise = torch.rand(3, dtype=x.dtype)
        if (x + noise).sum() > -1e9:
            x.add_(1)
        more = torch.rand(3, dtype=x.dtype)
        return x * noise + more

    for run in (lambda x: make_fx(f)(x.clone())(x), lambda x: vjp(f, x)[0]):
        mine, theirs = f64(3), None
        theirs = mine.clone()
        torch.manual_seed(3)
        expected = f(theirs)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        out = run(mine)
        assert_same(out, expected)
        assert_same(mine, theirs)
        assert torch.equal(torch.get_rng_state(), after)


def test_a_number_from_a_generator_of_ones_own():
    generator = torch.Generator()

    def f(x):
        noise = torch.rand(3, dtype=x.dtype, generator=generator)
        n = int(torch.randint(2, 6, (), generator=generator))
        return (x**n * noise).sum() if noise.sum() > n / 4 else (x * noise).sum()

    for seed in range(4):
        x = f64(3)
        expected = grads(f)
        for run in (grad(f), lambda x: vmap(grad(f), randomness="same")(x.expand(2, 3))[1]):
            generator.manual_seed(seed)
            want = expected(x)
            after = generator.get_state()
            generator.manual_seed(seed)
            assert_same(run(x), want)
            assert torch.equal(generator.get_state(), after)


def test_a_number_from_a_random_draw():
    def f(x):
        n = int(torch.randint(2, 6, ()))
        return (x**n).sum()

    x = f64(3)
    torch.manual_seed(1)
    n = int(torch.randint(2, 6, ()))
    torch.manual_seed(1)
    assert_same(grad(f)(x), n * x ** (n - 1))


def test_asking_inside_nested_transforms():
    f = lambda x: (x * x.detach().sum().item()).sum() if x.sum() > 0 else (x**3).sum()
    for x in (f64(3).abs(), -f64(3).abs()):
        expected = grads(lambda x: grads(f, create_graph=True)(x).sum())(x)
        assert_same(grad(lambda x: grad(f)(x).sum())(x), expected)


def test_a_specialised_result_is_not_reused():
    f = grad(lambda x: (x * 2).sum() if x.sum() > 0 else (x * 3).sum())
    x = f64(3).abs()
    assert_same(f(x), torch.full_like(x, 2))
    assert_same(f(-x), torch.full_like(x, 3))
    assert_same(f(x), torch.full_like(x, 2))


def test_a_data_dependent_shape_is_right_or_an_error():
    f = lambda x: (x[x > 0] ** 2).sum()
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for run, expected in (
        (grad(f), grads(f)(x)),
        (lambda x: make_fx(f)(x)(x), f(x)),
        (jit(f), f(x)),
    ):
        try:
            out = run(x)
        except AotfuncError as error:
            assert "test_asking.py" in str(error)
        else:
            assert_same(out, expected)


def test_numpy_of_a_traced_value():
    f = lambda x: x * float(x.detach().numpy().sum())
    x = f64(3)
    try:
        out = make_fx(f)(x)(x)
    except AotfuncError as error:
        assert "test_asking.py" in str(error)
    else:
        assert_same(out, f(x))
    with pytest.raises(AotfuncError, match=r"test_asking\.py"):
        jit(f)(x)


# printing
# -------------------------------------------------------------------------------------------------


def test_print_never_asks(capsys):
    def f(x):
        y = x * 2
        print(y, f"{y}", repr(y))
        return y.sum()

    x = f64(3, 4)
    for run in (grad(f), jit(f), vmap(f)):
        run(x)
        text = capsys.readouterr().out
        assert "float64" in text and ("3, 4" in text or "4" in text)


# leaks
# -------------------------------------------------------------------------------------------------


def test_a_leaked_value_is_usable_after_an_unjitted_grad():
    kept = []

    def f(x):
        h = x.sin()
        kept.append(h)
        return h.sum()

    x = f64(3)
    grad(f)(x)
    assert torch.allclose(kept[0] + 0, x.sin())
    assert torch.allclose(kept[0] * 2, 2 * x.sin())


def normed(x, w):
    x = torch.stack([x, x.sin()])
    return torch.nn.functional.batch_norm(x, w, w.exp(), training=True)


#: what the function leaves behind, what is written to afterwards, and whether it is then refused
LEFT = {
    "argument": (lambda x, w: x.sin(), "x", True),
    "tensor from outside": (lambda x, w: w.exp(), "w", True),
    "view": (lambda x, w: w[1:], "w", True),
    "detached": (lambda x, w: (w * x).sum().detach(), "w", True),
    "written inside": (lambda x, w: w.add_(1) * x, None, True),
    "random": (lambda x, w: torch.randn(3), None, True),
    "of random": (lambda x, w: torch.nn.functional.dropout(x) * 2, None, True),
    "beside random": (lambda x, w: [x * 2, torch.randn(3)][0], None, False),
    "of another": (lambda x, w: w.exp(), "x", False),
    "nothing written": (lambda x, w: w.exp() * x, None, False),
    "asked for inside": (lambda x, w: [h := w * x, h.sum().item()][0], "w", False),
    "batch norm": (normed, None, False),
}


RUNS = {
    "grad": lambda f, x: grad(f)(x),
    "grad of grad": lambda f, x: grad(lambda x: grad(f)(x).sum())(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "vjp": vjp,
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "vmap": lambda f, x: vmap(lambda _: f(x), randomness="same")(torch.zeros(2)),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", LEFT)
def test_a_leaked_value_is_that_of_the_call_or_refused(case, run):
    make, target, refused = LEFT[case]
    kept, tensors = [], {"x": f64(3), "w": f64(3)}
    x, w = tensors.values()
    expected = make(x.clone(), w.clone())

    def f(x):
        kept.append(make(x, w))
        return (x * x).sum()

    RUNS[run](f, x)
    if target:
        tensors[target].mul_(2)
    if not refused:
        assert_same(kept[0] * 1, expected)
        return
    with pytest.raises(AotfuncError, match="leaked"):
        kept[0] * 1
    with pytest.raises(AotfuncError, match="leaked"):
        grad(lambda x: (x.sum() * kept[0]).sum())(x)


#: what is computed with leaked values; the last of them depends on the argument
USES = {
    "again inside": lambda f, kept, w: vmap(f)(torch.ones(2, 3)),
    "an op": lambda f, kept, w: kept[0] * 2,
    "a stack": lambda f, kept, w: torch.stack(kept[:4]),
    "an op with another": lambda f, kept, w: kept[0] * w,
    "a view": lambda f, kept, w: kept[0][1:],
    "detached": lambda f, kept, w: kept[0].detach() * w,
    "a number": lambda f, kept, w: kept[0].sum().item() * w,
    "kept detached": lambda f, kept, w: kept[1] * w,
    "kept under no_grad": lambda f, kept, w: kept[2] * w,
    "of the argument": lambda f, kept, w: kept[4] * w,
    "a view of the argument": lambda f, kept, w: kept[4][1:],
    "the argument again inside": lambda f, kept, w: grad(lambda x: (x * kept[4]).sum())(w),
}


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("case", USES)
def test_the_gradient_of_a_leaked_value(case, run, needs):
    use, kept = USES[case], []
    w, x = f64(3).requires_grad_(), f64(3).requires_grad_(needs)

    def f(x):
        if not kept:
            with torch.no_grad():
                hidden = w.exp()
            kept.extend([w.exp(), w.exp().detach(), hidden, w.sin() * w, x * w])
        return (x * kept[0]).sum()

    RUNS[run](f, x)
    real = [w.exp(), w.exp().detach(), w.exp().detach(), w.sin() * w, x * w]
    expected = use(lambda x: (x * real[0]).sum(), real, w)
    if needs and "argument" in case and run != "vmap":  # there it comes from outside
        with pytest.raises(AotfuncError, match="leaked"):
            use(f, kept, w).sum().backward()
        return
    y = use(f, kept, w)
    assert_same(y, expected)
    assert y.requires_grad == expected.requires_grad
    if y.requires_grad:
        assert_same(*[torch.autograd.grad(t.sum(), w) for t in (y, expected)])


def test_a_value_that_jit_leaves_in_a_list_is_real():
    kept = []

    def f(x):
        kept.append(x.sin())
        return x.sum()

    g, x = jit(f), f64(3)
    g(x)
    g(x + 1)
    assert torch.allclose(torch.stack(kept), torch.stack([x.sin(), (x + 1).sin()]))
    assert torch.allclose(grad(lambda x: (x * kept[0]).sum())(x), x.sin())


def test_a_value_leaked_from_jit_points_to_has_aux():
    kept = set()

    def f(x):
        kept.add(x.sin())
        return x.sum()

    jit(f)(f64(3))
    with pytest.raises(AotfuncError, match=r"aux|return"):
        kept.pop() + 1


def test_a_leaked_value_met_in_another_capture():
    kept = set()

    def f(x):
        kept.add(x.sin())
        return x.sum()

    jit(f)(f64(3))
    with pytest.raises(AotfuncError):
        grad(lambda x: (x * kept.pop()).sum())(f64(3))


def test_attributes_set_inside():
    class Net(torch.nn.Module):
        def forward(self, x):
            self.h = x * 2
            return self.h.sum()

    net, x = Net(), f64(3)
    assert_same(grad(net)(x), torch.full_like(x, 2))
    try:
        value = net.h + 0
    except AotfuncError:
        return
    assert torch.allclose(value, 2 * x)


def test_backward_inside_f_onto_a_closed_over_leaf_is_refused():
    w = f64(3).requires_grad_()

    def f(x):
        (w * x).sum().backward()
        return x.sum()

    with pytest.raises((AotfuncError, RuntimeError)):
        grad(f)(f64(3))
    assert w.grad is None


# errors name the user's line
# -----------------------------------------------------------------------------------------


def test_no_internal_frames_are_needed_to_understand():
    def model(x):
        scale = x.mean().item()  # asked here
        return x * scale

    with pytest.raises(AotfuncError) as caught:
        jit(model)(f64(3))
    message = str(caught.value)
    assert "test_asking.py" in message and "model" in message


def test_global_state_survives_an_error():
    def f(x):
        with torch.no_grad():
            x.sum().item()
        return x

    with pytest.raises(AotfuncError):
        vmap(f)(f64(2, 3))
    assert torch.is_grad_enabled()
    assert torch.ones(2).sum().item() == 2
    assert type(torch.ones(2) * 2) is torch.Tensor
    assert_same(aotfunc.grad(lambda x: x.sum())(torch.ones(2)), torch.ones(2))


# loops that ask in every round
# --------------------------------------------------------------------------------------


def rounds(n, asks=True):
    def f(x):
        y = x
        for _ in range(n):
            y = y - 0.1 * y.sin() * x
            y = y * 2 if asks and y.abs().max() < 1e-9 else y
        return y.sum()

    return f


def inner_gradients(n, asks=True):
    def f(x):
        y = x
        for _ in range(n):
            y = y - 0.1 * grad(lambda y: (y * x).sin().sum())(y)
            if asks and y.detach().norm() > 1e9:
                break
        return y.sum()

    return f


def adapted(n, asks=True):
    def f(x):
        y = x
        for k in range(n):
            (g,) = torch.autograd.grad((y.sin() * y * (k + 2)).sum(), y, create_graph=True)
            y = y - 0.01 * g
            if asks and g.detach().norm() > 1e9:
                break
        return y.sum()

    return f


@pytest.mark.parametrize("f", [rounds, inner_gradients, adapted])
@pytest.mark.parametrize(
    "how",
    [
        grad,
        vmap,
        lambda f: grad(lambda x: grad(f)(x).sum()),
        lambda f: vmap(grad(f)),
        lambda f: grad(lambda x: vmap(f)(x).sum()),
        lambda f: vmap(vmap(f)),
        lambda f: vmap(lambda x: jvp(f, (x,), (x,))[1]),
        lambda f: vmap(f, in_dims=1),
        lambda f: vmap(
            lambda x: vmap(lambda y: f(y.cos() * x.sin().sum()), in_dims=-1)(x.exp()).sum() * x
        ),
        lambda f: vmap(lambda x: grad(lambda y: f(y * x.sin()))(x.exp())),
    ],
    ids=[
        "grad",
        "vmap",
        "grad grad",
        "vmap grad",
        "grad vmap",
        "vmap vmap",
        "vmap jvp",
        "vmap of columns",
    ]
    + ["steps around vmap", "steps around grad"],
)
def test_what_has_been_run_for_an_answer_is_not_run_again(monkeypatch, f, how):
    """The steps that are run to answer grow as the rounds do, and the answers are right."""
    ran = []

    def counted(module, name, steps):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args: (ran.append(steps(*args)), original(*args))[1]
        )

    counted(replay, "instr_run", lambda *_: 1)
    counted(followed, "steps_as_program", lambda records, *_: len(records))
    counted(concretize, "so_far", lambda trace, _: len(trace.records))
    x, steps = f64(2, 3, 4) if how is not grad else f64(4), []
    for n in (10, 20):
        ran.clear()
        out = how(f(n))(x)
        steps.append(sum(ran))
        assert_same(out, how(f(n, asks=False))(x))
    assert steps[0] >= 10 and steps[1] < 2.5 * steps[0]


# ----- writes between questions ------------------------------------------------------------------


def written_through_itself(x):
    y = x * 2
    part = y[:2]
    a = y.sum().item()
    y.add_(1)
    b = part.sum().item()
    part.mul_(3)
    return y * a + b + y.sum().item()


def written_through_a_view(x):
    y = x * 2
    a = y.sum().item()
    rows = y.view(2, 2)
    rows.add_(1)
    b = y.sum().item()
    y.mul_(2)
    rows[0].add_(rows.sum().item())
    return y * a + b * rows.flatten() + y.sum().item()


def views_made_before_the_question(x):
    y = x * 2
    first, last = y[:3], y[1:]
    a = y.sum().item()
    first.mul_(5)
    b = last.sum().item()
    last.copy_(first.clone())
    return first * a + y.sum().item() * b


def of_what_is_the_same_for_all(x):
    y = torch.ones(4)
    a = y.sum().item()
    y.add_(x)
    b = y.sum().item()
    y.mul_(b)
    return y + a + y.sum().item()


def an_accumulator(x):
    total, rounds = torch.zeros(4), 0
    while total.sum().item() < 5:
        total += x * x
        rounds += 1
    return total * rounds


@pytest.mark.parametrize("around", ["vmap", "vmap twice", "vmap of grad"])
@pytest.mark.parametrize(
    "f",
    [
        written_through_itself,
        written_through_a_view,
        views_made_before_the_question,
        of_what_is_the_same_for_all,
        an_accumulator,
    ],
)
def test_writes_between_questions(f, around, monkeypatch):
    whole, so_far = [], concretize.so_far
    monkeypatch.setattr(concretize, "so_far", lambda *args: whole.append(1) or so_far(*args))
    x = torch.tensor([0.3, -1.2, 0.7, 0.4])
    if around == "vmap of grad":
        expected = grads(lambda x: f(x).sum())(x)
        got = vmap(grad(lambda x: f(x).sum()))(x.repeat(3, 1))
    elif around == "vmap":
        expected, got = f(x), vmap(f)(x.repeat(3, 1))
    else:
        expected, got = f(x), vmap(vmap(f))(x.repeat(2, 3, 1)).flatten(0, 1)
    for row in got:
        torch.testing.assert_close(row, expected)
    if f in (of_what_is_the_same_for_all, an_accumulator):  # the others read what is stale
        assert around != "vmap" or not whole


# what waits until it is asked for
# -------------------------------------------------------------------------------------------------


def asked_after_a_write(x, y):
    doubled = x * 2
    x.add_(1)
    return y * 2 if doubled.sum() < 5 * x.numel() else y * 3


def asked_beside_a_write(x, y):
    row = x[0]
    sums = row.sin(), x.cos()
    row.mul_(3)
    return y * float(sums[0][0]) + y * float(sums[1][0, 0]) + y * float(x[0, 0] + row[1])


def asked_after_a_draw(x, y):
    halves = x / 2
    drawn = torch.rand_like(x) * halves
    return y * 2 if (drawn <= halves).all() else y * drawn.sum().item()


def asked_for_parts(x, y):
    largest, where = (x * 2).max(1)
    left, right = largest.split(32)
    return y * float(right[3]) + y * int(where[5]) + y * float(left[2])


WAITING = [asked_after_a_write, asked_beside_a_write, asked_after_a_draw, asked_for_parts]


@pytest.mark.parametrize("f", WAITING, ids=lambda f: f.__name__)
def test_large_steps_that_wait_see_what_they_would_have_seen(f):
    x, y = torch.full((64, 128), 2.0, dtype=torch.float64), f64(4)
    run = lambda y: f(x.clone(), y).sum()
    torch.manual_seed(0)
    expected = grads(run)(y)
    torch.manual_seed(0)
    assert_same(grad(run)(y), expected)
    assert_same(grad(lambda x: f(x.clone(), y).sum())(x), torch.zeros_like(x))


def test_large_steps_run_early_only_if_they_are_asked_for(monkeypatch):
    early = []
    run = replay.instr_run
    monkeypatch.setattr(replay, "instr_run", lambda i, v: early.append(str(i.op)) or run(i, v))

    def f(x, w):
        h = (x @ w).tanh()
        return h.sum() * 2 if w.sum() > 0 else (h @ w).sum()

    x, w = f64(128, 64), f64(64, 64) ** 2
    assert_same(grad(f)(x, w), grads(f)(x, w))
    assert early == ["aten.sum.default", "aten.gt.Scalar"]


def test_a_storage_is_known_by_its_views():
    def f(x):
        y = x * 2
        mine, part, other = (t.untyped_storage() for t in (y, y[1:], x * 3))
        same = mine == part, mine._cdata == part._cdata, mine == other, mine._cdata == other._cdata
        return y, *same, len(mine), len({hash(mine), hash(part)}), mine.nbytes()

    x = torch.ones(3)
    assert jit(f)(x)[1:] == f(x)[1:] == (True, True, False, False, 12, 1, 12)


# values of gradients taken inside
# -------------------------------------------------------------------------------------------------


def asked_of_a_gradient(x):
    w = torch.ones_like(x, requires_grad=True)  # x * w is x, but not for its gradient
    (g,) = torch.autograd.grad(((x.detach() * w) ** 2).sum(), w)
    g[0] *= 2
    return x * g.norm().item() if g.sum() > 1e-3 else x * 0


def asked_beside_a_gradient(x):
    y = x * torch.rand(3, dtype=x.dtype)
    (g,) = torch.autograd.grad((y**3).sum(), y, create_graph=True)
    return x * g * (2 if x.abs().max() < 9 else 3) + y * torch.rand(1, dtype=x.dtype).item()


def asked_of_a_grad(x):
    w = torch.ones_like(x, requires_grad=True)
    (x.detach() * w).square().sum().backward()
    return x * w.grad.norm().item()


@pytest.mark.parametrize(
    "f", [asked_of_a_gradient, asked_beside_a_gradient, asked_of_a_grad], ids=lambda f: f.__name__
)
def test_gradients_taken_inside_have_values(f):
    x, run = f64(3), lambda x: f(x).sum()
    torch.manual_seed(0)
    expected = grads(run)(x)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert_same(grad(run)(x), expected)
    assert_same(torch.get_rng_state(), state)
    with pytest.raises(AotfuncError, match="asked for, but jit"):
        jit(f)(x)


def test_samples_answer_about_a_gradient():
    def f(x):
        w = torch.ones_like(x, requires_grad=True)
        (g,) = torch.autograd.grad(((x.detach() * w) ** 2).sum(), w)
        return x * 2 if g.sum() > 0 else x * 3

    x = f64(4, 3)
    assert_same(vmap(f)(x), loop(f)(x))


def test_a_question_under_another_default_dtype_changes_no_value():
    def f(x):
        third = (x.detach() * 0 + 1).long() / 3  # of the default dtype
        torch.set_default_dtype(torch.float64)
        try:
            return x * third[0].item()
        finally:
            torch.set_default_dtype(torch.float32)

    x = f64(4, 3)
    assert_same(grad(lambda x: f(x).sum())(x[0]), grads(lambda x: f(x).sum())(x[0]))
    assert_same(vmap(f)(x), loop(f)(x))
