"""Whole training steps inside of compiled functions: the ``.grad`` of parameters from outside is
read, bound and added to, and optimizers step, as in eager mode."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves

from aotfunc import aot_function, grad, jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same

D = torch.float64
WAYS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "jit in jit": lambda f: (lambda j: jit(lambda *args: j(*args)))(jit(f)),
}
ways = pytest.mark.parametrize("way", WAYS)


def layer():
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=D)


def batches(count=4):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, dtype=D, generator=g) for _ in range(count)]


def stepping(net, optimizer, to_none=True):
    def step(x):
        optimizer.zero_grad(set_to_none=to_none)
        loss = net(x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        return loss.detach()

    return step


def trained(net, optimizer):
    """Return all that training changes."""
    kept = [x for x in tree_leaves(optimizer.state_dict()) if isinstance(x, torch.Tensor)]
    return [*net.state_dict().values(), *[p.grad for p in net.parameters()], *kept]


OPTIMIZERS = {
    "SGD": lambda ps: optim.SGD(ps, 0.1),
    "SGD, Nesterov": lambda ps: optim.SGD(ps, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, fused": lambda ps: optim.SGD(ps, 0.1, momentum=0.9, fused=True),
    "Adam": lambda ps: optim.Adam(ps, 0.1),
    "Adam, AMSGrad": lambda ps: optim.Adam(ps, 0.1, amsgrad=True, maximize=True, weight_decay=0.1),
    "Adam, foreach": lambda ps: optim.Adam(ps, 0.1, foreach=True),
    "Adam, fused": lambda ps: optim.Adam(ps, 0.1, fused=True),
    "Adam, the rate a tensor": lambda ps: optim.Adam(ps, torch.tensor(0.1)),
    "AdamW": lambda ps: optim.AdamW(ps, 0.1),
    "Adagrad": lambda ps: optim.Adagrad(ps, 0.1, lr_decay=0.1),
    "Adamax": lambda ps: optim.Adamax(ps, 0.1),
    "Adadelta": lambda ps: optim.Adadelta(ps),
    "NAdam": lambda ps: optim.NAdam(ps, 0.1),
    "RMSprop": lambda ps: optim.RMSprop(ps, 0.1, momentum=0.9, centered=True),
    "RAdam": lambda ps: optim.RAdam(ps, 0.1),
    "RAdam, foreach": lambda ps: optim.RAdam(
        ps, 0.1, foreach=True, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "ASGD": lambda ps: optim.ASGD(ps, 0.1, lambd=0.1, t0=2, weight_decay=0.1),
    "ASGD, foreach": lambda ps: optim.ASGD(ps, 0.1, foreach=True, maximize=True),
    "Adafactor": lambda ps: optim.Adafactor(ps, 0.1),
    "Adafactor, foreach": lambda ps: optim.Adafactor(ps, 2.0, foreach=True, weight_decay=0.1),
    "Rprop": lambda ps: optim.Rprop(ps, 0.1),
    "groups": lambda ps: optim.SGD(
        [{"params": [p], "lr": 0.1 / n} for n, p in enumerate(ps, 1)], momentum=0.9
    ),
}


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_optimizers(name, to_none):
    """The first call makes an optimizer's state, so the second is captured anew."""
    nets = layer(), layer()
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in nets]
    eager, compiled = (stepping(n, o, to_none) for n, o in zip(nets, optimizers, strict=True))
    compiled = jit(compiled)
    for x in batches(8):
        assert_same(compiled(x), eager(x))
        assert_same(*map(trained, nets, optimizers))
    assert len(compiled.entries) == 1


def test_a_state_of_doubles_keeps_numbers_of_the_default_dtype():
    """ASGD makes its rates such tensors; a loaded state has the dtype of the parameters."""
    nets = layer(), layer()
    optimizers = [OPTIMIZERS["ASGD"](net.parameters()) for net in nets]
    eager, compiled = map(stepping, nets, optimizers)
    for step in (eager, compiled):
        step(batches()[0])
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    compiled = jit(compiled, backend="eager")
    for x in batches(6):
        compiled(x), eager(x)
        for a, b in zip(*map(trained, nets, optimizers), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["ASGD", "Adafactor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_factor_of_a_sum_is_rounded_as_its_terms(name, dtype):
    """A difference is left at the end of a tensor, which PyTorch's kernel computes otherwise."""
    runs = []
    for around in (lambda f: f, lambda f: jit(f, backend="eager")):
        torch.manual_seed(0)
        p = torch.randn(4096).to(dtype).requires_grad_()
        optimizer = OPTIMIZERS[name]([p])

        def step(g, p=p, optimizer=optimizer):
            optimizer.zero_grad()
            (p * g).sum().backward()
            optimizer.step()

        step(torch.ones(4096, dtype=dtype))
        around(step)(torch.linspace(-1, 1, 4096).to(dtype))
        runs.append(p.detach())
    assert runs[0].equal(runs[1])


def run_of(program, around=lambda f: f):
    """Return what a program's steps return, and what they leave in its modules."""
    step, nets = program(around)
    found = [step(x) for x in batches()]
    left = [(p.grad, p.requires_grad) for net in nets for p in net.parameters()]
    return found, [net.state_dict() for net in nets], left


def accumulating(around):
    """Gradients are added in the memory of the first."""
    net = layer()

    def step(x):
        net(x).square().sum().backward()
        return net.weight.grad

    compiled, seen = around(step), []

    def call(x):
        g = compiled(x)
        seen.append(g)
        return g.clone(), g is net.weight.grad, g is seen[0]

    return call, [net]


def by_hand(around):
    net = layer()

    def step(x):
        for p in net.parameters():
            p.grad = None
        net(x).square().sum().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad

    return around(step), [net]


def two_networks(around):
    torch.manual_seed(0)
    maker, judge = nn.Linear(3, 3, dtype=D), nn.Linear(3, 1, dtype=D)
    makes, judges = (optim.Adam(m.parameters(), 0.1) for m in (maker, judge))

    def step(x):
        judges.zero_grad()
        loss = F.softplus(-judge(x)).mean() + F.softplus(judge(maker(x).detach())).mean()
        loss.backward()
        judges.step()
        makes.zero_grad()
        other = F.softplus(-judge(maker(x))).mean()
        other.backward()
        makes.step()
        return loss.detach(), other.detach()

    return around(step), [maker, judge]


def up_and_down(around):
    """Sharpness-aware minimization: the gradient at a place near by."""
    net = layer()
    optimizer = optim.SGD(net.parameters(), 0.1)

    def step(x):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        before = [p.detach().clone() for p in net.parameters()]
        with torch.no_grad():
            for p in net.parameters():
                p.add_(p.grad / p.grad.norm(), alpha=0.05)
        optimizer.zero_grad()
        net(x).square().sum().backward()
        with torch.no_grad():
            for p, old in zip(net.parameters(), before, strict=True):
                p.copy_(old)
        optimizer.step()

    return around(step), [net]


def written_before_the_backward(around):
    net = layer()

    def step(x):
        net.zero_grad()
        loss = net(x).square().sum()
        with torch.no_grad():
            net.bias.add_(1)
        net.weight.data = net.weight.data * 0.9
        (loss + net(x).sum()).backward()
        return net.weight.grad.clone(), net.bias.grad.clone()

    return around(step), [net]


def of_a_gradient(around):
    net = layer()

    def step(x):
        net.zero_grad()
        net(x).pow(3).sum().backward(create_graph=True)
        net.weight.grad.square().sum().backward()
        return net.weight.grad.detach()

    return around(step), [net]


def with_a_closure(around):
    net = layer()
    optimizer = optim.SGD(net.parameters(), 0.1)

    def step(x):
        def loss():
            optimizer.zero_grad()
            value = net(x).square().sum()
            value.backward()
            return value

        return optimizer.step(loss)

    return around(step), [net]


def some_unused(around):
    net, other = layer(), layer()
    other.weight = net.weight
    optimizer = optim.AdamW([*net.parameters(), other.bias], 0.1)

    def step(x):
        optimizer.zero_grad()
        loss = (net(x) * F.linear(x, other.weight)).sum()
        loss.backward()
        optimizer.step()
        return loss

    return around(step), [net, other]


def step_alone(around):
    """The gradients are made outside, and other tensors at each call."""
    net = layer()
    optimizer = optim.Adam(net.parameters(), 0.1)
    compiled = around(optimizer.step)

    def step(x):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        compiled()

    return step, [net]


def with_a_schedule(around):
    net = layer()
    optimizer = optim.SGD(net.parameters(), 0.1)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    compiled = around(stepping(net, optimizer))

    def step(x):
        loss = compiled(x)
        schedule.step()
        return loss

    return step, [net]


def with_statistics(around):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).to(D)
    return around(stepping(net, optim.AdamW(net.parameters(), 0.1))), [net]


def loading_a_state(around):
    net = layer()
    optimizer = optim.Adam(net.parameters(), 0.1)
    compiled = around(stepping(net, optimizer))

    def step(x):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return compiled(x)

    return step, [net]


PROGRAMS = [
    *(accumulating, by_hand, two_networks, up_and_down, written_before_the_backward),
    *(of_a_gradient, with_a_closure),
    *(some_unused, step_alone, with_a_schedule, with_statistics, loading_a_state),
]


@ways
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, way):
    torch.manual_seed(2)
    want = run_of(program)
    torch.manual_seed(2)
    assert_same(run_of(program, WAYS[way]), want)


def scheduled(change, result=lambda loss, group: loss):
    """A step of an optimizer whose rate is changed after each."""

    def make(around):
        net = layer()
        groups = [{"params": [p], "lr": 0.1} for p in net.parameters()]
        optimizer = optim.SGD(groups, momentum=0.9)
        group = optimizer.param_groups[0]

        def step(x):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            return result(loss, group)

        compiled = around(step)

        def call(x):
            found = compiled(x)
            change(group)
            return found, [g["lr"] for g in optimizer.param_groups], compiled

        return call, net

    return make


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize(
    "change", [lambda g: g.update(lr=g["lr"] * 0.5), lambda g: g.update(lr=1), lambda g: None]
)
def test_a_rate_that_changes_is_no_other_program(change, backend):
    found = []
    for around in (lambda f: f, lambda f: jit(f, backend=backend)):
        call, net = scheduled(change)(around)
        results = [call(x) for x in batches(6)]
        found.append(([(loss.detach(), rates) for loss, rates, _ in results], [*net.parameters()]))
    assert_same(found[1], found[0])
    assert results[-1][2].captures <= 3


READS = {
    "a text": lambda loss, group: (loss, f"{group['lr']:.3f}"),
    "a number": lambda loss, group: (loss, group["lr"]),
    "a factor": lambda loss, group: loss * group["lr"],
    "a branch": lambda loss, group: loss if group["lr"] > 0.03 else -loss,
    "bound": lambda loss, group: (loss, group.update(lr=group["lr"] / 2)),
    "its class": lambda loss, group: loss if isinstance(group["lr"], float) else -loss,
    "a key": lambda loss, group: loss * {0.1: 2}.get(group["lr"], 3),
}


@ways
@pytest.mark.parametrize("name", READS)
def test_a_rate_that_is_read(name, way):
    """It is a number for the function, and stays one."""
    found = []
    for around in (lambda f: f, WAYS[way]):
        call, net = scheduled(lambda g: g.update(lr=g["lr"] * 0.7), READS[name])(around)
        results = [call(x)[:2] for x in batches(4)]
        assert all(type(rate) is float for _, rates in results for rate in rates)
        found.append((results, [*net.parameters()]))
    assert_same(*[torch.utils._pytree.tree_map_only(torch.Tensor, torch.detach, f) for f in found])


class Own(optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            slow = isinstance(rate := group["lr"], float) and {0.1: True}.get(rate, False)
            for p in group["params"]:
                p.sub_(p.grad * (rate / 2 if slow else rate))


@pytest.mark.parametrize("rates", [[0.1, 0.2, 0.1, 0.3], [0.0, -0.0, 0.0, 0.1]])
def test_rates_of_an_optimizer_of_the_users(rates):
    nets = layer(), layer()
    optimizers = [Own(net.parameters(), {"lr": 0.1}) for net in nets]
    eager, compiled = map(stepping, nets, optimizers)
    compiled = jit(compiled, backend="eager")
    for x, rate in zip(batches(), rates, strict=True):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        assert_same(compiled(x), eager(x))
        assert_same(*map(trained, nets, optimizers))


def test_the_sign_of_a_rate_of_zero():
    w = nn.Parameter(torch.zeros(1))
    w.grad = torch.ones(1)
    optimizer = optim.SGD([w], 0.0)
    step = jit(optimizer.step, backend="eager")
    for rate in (0.0, -0.0, 0.0, -0.0):
        optimizer.param_groups[0]["lr"] = rate
        w.data.fill_(-0.0)
        want = torch.full_like(w, -0.0).add_(w.grad, alpha=-rate)
        step()
        assert torch.equal(torch.signbit(w), torch.signbit(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SGD, Nesterov", "Adam", "AdamW", "Adagrad"])
def test_rates_are_not_rounded(name, dtype):
    """Kernels for low precision compute in float32: bits are eager's."""
    nets = layer().to(dtype), layer().to(dtype)
    for net in nets:
        for p in net.parameters():
            p.grad = torch.linspace(-1, 1, p.numel(), dtype=dtype).view_as(p)
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in nets]
    step = jit(optimizers[1].step, backend="eager")
    for _ in range(4):
        optimizers[0].step()
        step()
        for a, b in zip(*map(trained, nets, optimizers), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("post", [False, True])
def test_hooks_of_all_optimizers(post):
    def double(optimizer, args, kwargs):
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(2)

    register = register_optimizer_step_post_hook if post else register_optimizer_step_pre_hook
    nets = layer(), layer()
    eager, compiled = (stepping(net, optim.SGD(net.parameters(), 0.1)) for net in nets)
    compiled = jit(compiled, backend="eager")
    for step, x in enumerate(batches(6)):
        handle = register(double) if step in (1, 4) else None
        assert_same(compiled(x), eager(x))
        assert_same(*[[*net.parameters()] for net in nets])
        if handle is not None:
            handle.remove()


# ----- a gradient as a tensor --------------------------------------------------------------------


@ways
def test_gradients_are_read_at_each_call(way):
    net = layer()
    f = WAYS[way](lambda: [None if p.grad is None else p.grad.norm() for p in net.parameters()])
    assert f() == [None, None]
    net(batches()[0]).sum().backward()
    for change in (
        lambda: None,
        lambda: net.bias.grad.fill_(7.0),
        lambda: setattr(net.bias, "grad", torch.ones(2, dtype=D)),
        lambda: setattr(net.weight, "grad", None),
    ):
        change()
        assert_same(f(), [None if p.grad is None else p.grad.norm() for p in net.parameters()])


@ways
def test_a_gradient_is_the_argument_or_its_view(way):
    net = layer()

    def bind(x):
        net.weight.grad = x
        net.bias.grad = net.weight.grad[:, 0]

    f = WAYS[way](bind)
    for k in range(3):
        x = torch.full((2, 3), float(k), dtype=D)
        f(x)
        assert net.weight.grad is x
        assert_same(net.bias.grad, x[:, 0])
        assert net.bias.grad.data_ptr() == x.data_ptr()


@ways
def test_views_of_gradients_share_their_memory(way):
    net = layer()
    f = WAYS[way](lambda: net.weight.grad.t())
    for x in batches(3):
        net.zero_grad()
        net(x).square().sum().backward()
        found = f()
        assert_same(found, net.weight.grad.t())
        assert found.data_ptr() == net.weight.grad.data_ptr()


@ways
def test_an_error_after_the_backward(way):
    """It leaves what eager leaves."""
    net = layer()

    def raising(x):
        net(x).square().sum().backward()
        raise ValueError("after the backward")

    def left(f):
        net.zero_grad()
        for x in batches(2):
            with pytest.raises(ValueError, match="after the backward"):
                f(x)
        return [p.grad for p in net.parameters()]

    assert_same(left(WAYS[way](raising)), left(raising))


@ways
def test_a_refusal_after_the_backward(way):
    net = layer()

    def asking(x):
        net(x).square().sum().backward()
        return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError):
        WAYS[way](asking)(batches()[0])
    assert net.weight.grad is None


def test_a_network_and_its_optimizer_bound_anew_are_free():
    net = layer()
    optimizer = optim.Adam(net.parameters(), 0.1)

    def step(x):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()

    f, (x, *_) = jit(step, backend="eager"), batches()
    for _ in range(3):
        f(x)
    old = [weakref.ref(t) for t in (net, optimizer, net.weight, net.weight.grad)]
    net = layer()
    optimizer = optim.Adam(net.parameters(), 0.1)
    f(x)
    gc.collect()  # PyTorch's optimizers are in reference cycles
    assert [r() for r in old] == [None] * 4


def test_lowered_steps_change_nothing():
    net = layer()
    f = jit(stepping(net, optim.Adam(net.parameters(), 0.1)))
    before = copy.deepcopy(net.state_dict())
    low = f.lower(batches()[0])
    assert "addmm" in low.code
    assert_same(net.state_dict(), before)
    assert net.weight.grad is None


def test_hooks_after_accumulation_are_refused():
    """Whenever they were registered."""
    net = layer()
    f = jit(lambda x: net(x).square().sum().backward())
    f(batches()[0])
    handle = net.weight.register_post_accumulate_grad_hook(lambda p: None)
    before = net.weight.grad.clone()
    with pytest.raises(CaptureError, match="post-accumulate hooks"):
        f(batches()[0])
    assert_same(net.weight.grad, before)
    handle.remove()
    f(batches()[0])
    assert_same(net.weight.grad, before * 2)


def test_a_backward_under_a_transform_is_refused():
    net = layer()
    f = jit(lambda x: (net(x).square().sum().backward(), x.sum())[1])
    with pytest.raises(CaptureError, match=r"\.grad"):
        grad(f)(batches()[0])
    assert net.weight.grad is None
    f(batches()[0])
    assert net.weight.grad is not None


# ----- the loss as a result ----------------------------------------------------------------------


def returning(retain, shape=lambda loss: loss):
    def make(around):
        net = layer()

        def step(x):
            net.zero_grad()
            loss = net(x).square().sum()
            loss.backward(retain_graph=retain)
            return shape(loss)

        return net, around(step)

    return make


SHAPES = {
    "itself": lambda loss: loss,
    "a tuple": lambda loss: (loss, loss.detach(), loss),
    "a dict": lambda loss: {"loss": loss},
    "computed from it": lambda loss: loss * 2,
}


@ways
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("retain", [False, True])
def test_a_loss_after_its_backward(way, shape, retain):
    """Its graph is freed, unless it is retained: another backward is an error, as in eager mode,
    or adds the same gradient again."""
    found = []
    for around in (lambda f: f, WAYS[way]):
        net, step = returning(retain, SHAPES[shape])(around)
        for x in batches(3):
            y = step(x)
        first = next(iter(tree_leaves(y)))
        try:
            first.backward()
            seen = net.weight.grad
        except RuntimeError:
            seen = None
        found.append((y, [t.requires_grad for t in tree_leaves(y)], seen))
    (want, flags, seen), (got, found_flags, ours) = found
    assert_same([t.detach() for t in tree_leaves(got)], [t.detach() for t in tree_leaves(want)])
    assert found_flags == flags
    assert shape in ("a dict", "computed from it") or (ours is None) == (seen is None)
    if seen is not None:
        assert_same(ours, seen)


def test_a_freed_graph_holds_nothing():
    """Results of a step have no residuals."""
    net, step = returning(False)(lambda f: jit(f, backend="eager"))
    loss = step(batches()[0])
    assert loss.requires_grad and loss.grad_fn.next_functions[0][0].variable.numel() == 1
    with pytest.raises(RuntimeError, match="frees its graph"):
        loss.backward()
