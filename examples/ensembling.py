"""An ensemble of networks trained as one: their parameters are stacked, and ``vmap`` runs over the
stack.

Each member sees its own bootstrap sample of the data. Where there was data the members agree;
where there was none they don't, and that disagreement is the ensemble's estimate of what it does
not know."""

import copy

import torch
from torch import nn
from torch.testing import assert_close

from aotfunc import (
    combine_state_for_ensemble,
    functional_call,
    grad_and_value,
    stack_module_state,
    vmap,
)


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    ).double()


def weighted_loss(prediction, y, weight):
    return (weight * (prediction - y).square().squeeze(-1)).mean()


def train_alone(net: nn.Module, x, y, weight, steps: int, lr: float) -> dict[str, torch.Tensor]:
    """The reference: one member, plain autograd."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        weighted_loss(net(x), y, weight).backward()
        optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


def main(quick: bool = False):
    members, steps, lr = (4, 300, 0.05) if quick else (8, 600, 0.05)
    torch.manual_seed(0)
    x = torch.empty(64, 1, dtype=torch.float64).uniform_(-2, 2)
    y = torch.sin(2 * x) + 0.05 * torch.randn_like(x)
    # How often each point was drawn when 64 are drawn with replacement, one row per member.
    weights = torch.stack(
        [torch.randint(64, (64,)).bincount(minlength=64) for _ in range(members)]
    ).double()

    nets = [make_net() for _ in range(members)]
    skeleton = copy.deepcopy(nets[0]).to("meta")

    def loss(params, x, y, weight):
        return weighted_loss(functional_call(skeleton, params, x), y, weight)

    params, _ = stack_module_state(nets)
    params = {name: p.detach() for name, p in params.items()}
    momentum = {name: torch.zeros_like(p) for name, p in params.items()}
    step = vmap(grad_and_value(loss), in_dims=(0, None, None, 0))
    first = None
    for _ in range(steps):
        grads, losses = step(params, x, y, weights)
        first = losses if first is None else first
        momentum = {name: 0.9 * momentum[name] + grads[name] for name in params}
        params = {name: params[name] - lr * momentum[name] for name in params}
    print(f"{members} members, {steps} steps: loss {first.mean():.3f} -> {losses.mean():.4f}")
    assert (losses < first).all()

    alone = train_alone(copy.deepcopy(nets[1]), x, y, weights[1], steps, lr)
    assert_close({name: p[1] for name, p in params.items()}, alone, rtol=1e-6, atol=1e-8)
    print("member 1 equals the same network trained alone by plain autograd")

    # functorch's older spelling of the same: a function, and the stacked state.
    fmodel, stacked, buffers = combine_state_for_ensemble(nets)
    assert_close(
        vmap(fmodel, in_dims=(0, 0, None))(stacked, buffers, x),
        torch.stack([net(x) for net in nets]),
    )

    predict = vmap(lambda params, x: functional_call(nets[0], params, x), in_dims=(0, None))
    inside = predict(params, torch.linspace(-1.5, 1.5, 50, dtype=torch.float64)[:, None])
    outside = predict(params, torch.linspace(4, 6, 50, dtype=torch.float64)[:, None])
    spread_in, spread_out = inside.std(0).mean().item(), outside.std(0).mean().item()
    print(
        f"spread of the members: {spread_in:.3f} where there was data, {spread_out:.3f} where "
        "there was none"
    )
    assert spread_out > 2 * spread_in


if __name__ == "__main__":
    main()
