"""``torch.amp.GradScaler`` inside of a compiled training step: skipped steps, scales that grow and
shrink, its state dictionary."""

import copy

import pytest
import torch
from torch import nn, optim

from aotfunc import jit
from aotfunc.errors import CaptureError
from tests.reference import assert_same

OPTIMIZERS = {
    "SGD": lambda ps: optim.SGD(ps, 0.1),
    "SGD, momentum": lambda ps: optim.SGD(ps, 0.1, momentum=0.9),
    "AdamW": lambda ps: optim.AdamW(ps, 0.1),
    "RAdam": lambda ps: optim.RAdam(ps, 0.1),
}


class Run:
    """A network with an optimizer and a scaler; ``step`` trains it."""

    def __init__(self, name, clips=False, **options):
        torch.manual_seed(0)
        self.net = net = nn.Linear(3, 2)
        self.optimizer = optimizer = OPTIMIZERS.get(name, name)(net.parameters())
        self.scaler = scaler = torch.amp.GradScaler("cpu", **options)

        def step(x):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            scaler.scale(loss).backward()
            if clips:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            return loss.detach()

        self.step = step

    def state(self):
        grads = [p.grad for p in self.net.parameters()]
        states = [x.state_dict() for x in (self.net, self.optimizer, self.scaler)]
        return grads, states, dict(self.scaler._per_optimizer_states)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_steps(name, clips):
    options = {"init_scale": 8.0, "growth_interval": 2, "backoff_factor": 0.3, "clips": clips}
    eager, compiled = Run(name, **options), Run(name, **options)
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, generator=g) for _ in range(9)]
    for k in (2, 3, 6):
        batches[k][0] = torch.inf
    assert_same(compiled.step(batches[0]), eager.step(batches[0]))
    step = jit(compiled.step)
    for x in batches[1:]:
        assert_same(step(x), eager.step(x))
        assert_same(compiled.state(), eager.state())
    assert len(step.entries) == 1 and eager.scaler.get_scale() == pytest.approx(1.728)


def test_scales_stay_finite():
    """A scale that would be infinite does not grow."""
    eager, compiled = (Run("SGD", init_scale=2.0**127, growth_interval=1) for _ in range(2))
    step, x = jit(compiled.step), torch.full((1, 3), 2.0**-40)
    for run in (eager, compiled):
        nn.init.constant_(run.net.weight, 2.0**-40)
        nn.init.zeros_(run.net.bias)
    for _ in range(3):
        assert_same(step(x), eager.step(x))
        assert_same(compiled.state(), eager.state())
    assert eager.scaler.get_scale() == 2.0**127


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_step_makes_a_state(name):
    """It is refused where it would be skipped: there would be none."""
    eager, compiled = Run(name), Run(name)
    step, x = jit(compiled.step), torch.ones(2, 3)
    before = copy.deepcopy(compiled.state())
    if name != "SGD":  # which has none
        for _ in range(2):
            with pytest.raises(RuntimeError, match="take that step outside"):
                step(x / 0)
            assert_same(compiled.state(), before)
    for batch in (x, x, x / 0, x):
        assert_same(step(batch), eager.step(batch))
        assert_same(compiled.state(), eager.state())
    assert len(step.entries) <= 2


def test_a_fused_step_is_refused():
    run = Run(lambda ps: optim.SGD(ps, 0.1, fused=True))
    with pytest.raises(CaptureError, match="leave `fused` out"):
        jit(run.step)(torch.ones(2, 3))


def test_an_iteration_that_ends_outside():
    """What a step leaves in its scaler is there for ``update``."""
    eager, compiled = Run("SGD"), Run("SGD")

    def half(run, x):
        run.optimizer.zero_grad()
        run.scaler.scale(run.net(x).square().mean()).backward()
        run.scaler.step(run.optimizer)

    step = jit(lambda x: (half(compiled, x), x)[1])
    for x in torch.ones(3, 2, 3):
        step(x)
        half(eager, x)
        for run in (eager, compiled):
            run.scaler.update()
        assert_same(compiled.state(), eager.state())


def test_the_scale_is_a_number_outside():
    """``get_scale()`` asks for a number that a program would keep."""
    run = Run("SGD")
    run.step(torch.ones(2, 3))
    with pytest.raises(CaptureError, match="a number was asked for"):
        jit(lambda x: x * run.scaler.get_scale())(torch.ones(3))
