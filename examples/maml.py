"""MAML: learn initial parameters from which one gradient step on a few points fits a new sinusoid.

Three transforms, one inside the other: ``grad`` for the inner step, ``vmap`` over tasks, ``grad``
of it all for the meta-step. The last one differentiates through the inner gradient."""

import math

import torch
from torch import nn
from torch.testing import assert_close

from aotfunc import functional_call, grad, grad_and_value, vmap

INNER_LR, SHOTS = 0.02, 10


def sample_tasks(n: int):
    """``n`` random sinusoids: points to adapt on and points to be judged on, each (n, SHOTS,
    1)."""
    amplitude, phase = (
        torch.empty(n, 1, 1).uniform_(0.5, 5.0),
        torch.empty(n, 1, 1).uniform_(0, math.pi),
    )
    support, query = torch.empty(2, n, SHOTS, 1).uniform_(-5, 5)
    return (
        support,
        amplitude * torch.sin(support + phase),
        query,
        amplitude * torch.sin(query + phase),
    )


def check_against_autograd(net, params, meta_loss, tasks):
    """The reference: a loop over tasks, and plain autograd with create_graph through each inner
    step."""
    names, leaves = list(params), [p.clone().requires_grad_() for p in params.values()]
    losses = []
    for support_x, support_y, query_x, query_y in zip(*tasks):
        out = functional_call(net, dict(zip(names, leaves)), support_x)
        grads = torch.autograd.grad(
            nn.functional.mse_loss(out, support_y), leaves, create_graph=True
        )
        adapted = {name: p - INNER_LR * g for name, p, g in zip(names, leaves, grads)}
        losses.append(nn.functional.mse_loss(functional_call(net, adapted, query_x), query_y))
    reference = torch.autograd.grad(torch.stack(losses).mean(), leaves)
    assert_close(
        list(grad(meta_loss)(params, *tasks).values()), list(reference), rtol=1e-4, atol=1e-5
    )
    print("meta-gradient: equal to a loop over tasks with create_graph")


def main(quick: bool = False):
    tasks_per_step, steps = (8, 60) if quick else (25, 600)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params, x, y):
        return nn.functional.mse_loss(functional_call(net, params, x), y)

    def adapt(params, x, y):
        grads = grad(loss)(params, x, y)
        return {name: p - INNER_LR * grads[name] for name, p in params.items()}

    def task_loss(params, support_x, support_y, query_x, query_y):
        return loss(adapt(params, support_x, support_y), query_x, query_y)

    def meta_loss(params, *tasks):
        return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(params, *tasks).mean()

    check_against_autograd(net, params, meta_loss, sample_tasks(4))

    unseen = sample_tasks(200)
    before = meta_loss(params, *unseen).item()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=3e-3)
    step = grad_and_value(meta_loss)
    for i in range(steps):
        grads, value = step(
            {name: p.detach() for name, p in leaves.items()}, *sample_tasks(tasks_per_step)
        )
        for name, p in leaves.items():
            p.grad = grads[name]
        optimizer.step()
        if i % 150 == 149:
            print(f"step {i + 1}: loss after one inner step {value.item():.2f}")

    trained = {name: p.detach() for name, p in leaves.items()}
    after = meta_loss(trained, *unseen).item()
    unadapted = vmap(loss, in_dims=(None, 0, 0))(trained, *unseen[2:]).mean().item()
    print(
        f"200 unseen tasks: loss {before:.2f} before, {after:.2f} after ({unadapted:.2f} without "
        "the inner step)"
    )
    assert after < before and after < unadapted
    assert quick or after < 0.6 * before


if __name__ == "__main__":
    main()
