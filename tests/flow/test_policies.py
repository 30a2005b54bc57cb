"""``scan(checkpoint=policy)``: a partition chooses what is stacked; results stay what they are."""

import functools
import gc
import itertools

import pytest
import torch

import aotfunc
from aotfunc import cache, checkpoint, grad, hessian, jit, jvp, scan, vmap, while_loop
from aotfunc.errors import ArgumentError, PartitionError
from aotfunc.graph import Program
from aotfunc.partition.policies import (
    everything_saveable,
    must_save,
    nothing_saveable,
    save_dots,
    save_only_these,
)
from tests.flow.test_scan import INTENT, PLAIN, XS, H, W, by_loop, kept, same
from tests.reference import assert_same, grads, hess
from tests.sweeps import every

NUMBERS = itertools.count()
POLICIES = {
    "nothing": nothing_saveable,
    "dots": save_dots,
    "everything": everything_saveable,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy):
    """Values and two orders of derivatives, whatever is stacked; what draws draws once."""
    options = {"checkpoint": POLICIES[policy]}
    by_policy = functools.partial(scan, **options)

    def run(loop, h, xs):
        more = {**options, "unroll": 2} if loop is scan else {}
        deep = lambda h, x: torch.sin(torch.tanh(W @ h + x) * h.cos() * H.exp())
        return loop(lambda h, x: (deep(h, x), h * x), h, xs, **more)[1] + xs

    same(run, H, XS)
    for name in every(3, INTENT):
        ours, plain = INTENT[name], PLAIN.get(name, INTENT[name])
        same(
            lambda loop, h, xs, f=(ours, plain): checked(by_policy, loop, f, h, xs),
            H[:2],
            XS[:, :2],
        )
    step = lambda c, x: ((c + torch.dropout(x, 0.5, True)).tanh() * c, c * torch.rand(3))
    found = []
    for loop in (by_policy, by_loop):
        torch.manual_seed(3)
        found.append(grad(lambda h, loop=loop: sum(map(torch.sum, loop(step, h, XS))))(H))
    assert_same(*found)
    batch = torch.stack([H, H * 2])
    one = lambda loop: lambda h: run(loop, h, XS).sin().sum()
    assert_same(vmap(grad(one(scan)))(batch), torch.stack(list(map(grads(one(by_loop)), batch))))
    assert_same(jit(hessian(one(scan)))(H), hess(one(by_loop), H))


def checked(by_policy, loop, steps, h, xs):
    ours, plain = steps
    c, y = by_policy(ours, h, xs) if loop is scan else loop(plain, h, xs)
    return c + (y * y).sum()


def test_what_policies_keep():
    deep = lambda h, x: (torch.sin(torch.tanh(W @ h + x) * h.cos()), None)
    run = lambda **options: lambda h: scan(deep, h, XS[:4], **options)[0].sum()
    stacks = {k: len(kept(run(checkpoint=p), H)) - 1 for k, p in POLICIES.items()}
    assert stacks == {"nothing": 1, "dots": 2, "everything": 2} and len(kept(run(), H)) == 5
    # a result that is stacked anyway, and what is the same in every step
    again = lambda h, x: ((h * W[0].exp()).sin() * x, h * W[0].exp())
    both = lambda h: sum(map(torch.sum, scan(again, h, XS[:4], checkpoint=POLICIES["everything"])))
    assert kept(both, H) == [[3], [4, 3]]
    named = lambda h, x: (
        torch.sin(aotfunc.checkpoint_name(torch.tanh(h) * x, "kept").cos()),
        None,
    )
    for policy, count in ((save_only_these("kept"), 1), (must_save("kept"), 2)):
        f = lambda h, policy=policy: scan(named, h, XS, checkpoint=policy)[0].sum()
        assert kept(f, H) == [[3], *[[5, 3]] * count]
    # of a product the part that is read
    part = lambda h, x: (torch.sin((torch.cat([W, W]) @ h)[:3]), None)
    assert kept(lambda h: scan(part, h, XS, checkpoint=save_dots)[0].sum(), H) == [[3], [5, 3]]


def of_policy(x, k):
    return scan(lambda c, y: ((c * y).sin(), None), x, XS, checkpoint=lambda n: 1)[0].sum()


def of_condition(x, k):
    return while_loop(lambda c: c.sum() < k, lambda c: c + 1, x, max_steps=3).sum()


@pytest.mark.parametrize("f", [of_policy, of_condition])
def test_what_no_one_has_again_is_forgotten(f, monkeypatch):
    for each in cache.EVERY:
        monkeypatch.setattr(each, "limit", 60)
    counts = []
    for _ in range(2):
        for _ in range(25):
            k = next(NUMBERS) * 0.01
            grad(lambda x, k=k: f(x, k))(H)
            jvp(lambda x, k=k: f(x, k), (H,), (H,))
        gc.collect()
        counts.append(sum(isinstance(p, Program) for p in gc.get_objects()))
    assert counts[1] < counts[0] + 25


class Unhashable:
    __hash__ = None

    def __call__(self, n):
        return 1


def test_policies_are_checked():
    def f(policy):
        step = lambda c, x: ((c * x).sin().exp(), None)
        return lambda h: scan(step, h, XS, checkpoint=policy)[0].sum()

    with pytest.raises(PartitionError, match=r"returns a Verdict, not None.*test_policies.py"):
        grad(f(lambda n: None))(H)
    with pytest.raises(PartitionError, match="returns a Verdict, not None"):
        jit(lambda h: (h.sin() * h).exp().sum(), policy=lambda n: None)(H.clone().requires_grad_())
    for run in (
        lambda: grad(f(Unhashable()))(H),
        lambda: checkpoint(torch.sin, policy=Unhashable()),
        lambda: jit(torch.sin, policy=Unhashable()),
    ):
        with pytest.raises(ArgumentError, match=r"policy must be hashable.*test_policies.py"):
            run()
    with pytest.raises(ArgumentError, match="checkpoint is a number of steps"):
        f(True)(H)
    with pytest.raises(ArgumentError, match="max_steps must be a positive int, not True"):
        while_loop(lambda h: h.sum() < 0, torch.sin, H, max_steps=True)
