"""A Wasserstein GAN with a gradient penalty: the critic's loss holds the norm of its gradient.

A step differentiates that gradient, once more, with respect to the critic's parameters. Both
networks are compiled modules; autograd differentiates them twice, as it does the modules
themselves, and the losses of both trainings are equal."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from aotfunc import aot_module


def mlp(n_in: int, n_out: int, width: int = 64) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(n_in, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
        nn.Linear(width, n_out),
    )


def real_points(count: int) -> Tensor:
    """Points near a circle of radius 2."""
    angle = 2 * torch.pi * torch.rand(count)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def penalty(critic: Callable, real: Tensor, fake: Tensor) -> Tensor:
    """How far the critic's slope is from 1, between real points and others."""
    share = torch.rand(len(real), 1)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def train(compiled: Callable, steps: int) -> tuple[Tensor, nn.Module]:
    """The critic's losses, and the generator."""
    torch.manual_seed(0)
    generator, critic = compiled(mlp(2, 2)), compiled(mlp(2, 1))
    forger = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.9))
    expert = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.9))
    losses = []
    for step in range(steps):
        real, fake = real_points(256), generator(torch.randn(256, 2)).detach()
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty(critic, real, fake)
        expert.zero_grad()
        loss.backward()
        expert.step()
        losses.append(loss.detach())
        if step % 3 == 2:
            forger.zero_grad()
            (-critic(generator(torch.randn(256, 2))).mean()).backward()
            forger.step()
    return torch.stack(losses), generator


def main(quick: bool = False):
    same = 20 if quick else 200
    train(aot_module, 3)  # compilers
    start = time.process_time()
    eager, _ = train(lambda module: module, same)
    middle = time.process_time()
    compiled, _ = train(aot_module, same)
    both = f"{middle - start:.2f} s eager, {time.process_time() - middle:.2f} s compiled"
    assert_close(compiled[:20], eager[:20], rtol=1e-3, atol=1e-4)
    print(f"equal losses in 20 steps; {same} steps take {both}, captures included")

    losses, generator = train(aot_module, 60 if quick else 1000)
    with torch.no_grad():
        radius = generator(torch.randn(1000, 2)).norm(dim=1)
    print(
        f"the critic's loss {losses[0]:.2f} -> {losses[-1]:.2f}; points lie at a radius of "
        f"{radius.mean():.2f} ± {radius.std():.2f}, real ones at 2.00"
    )
    assert losses.isfinite().all() and losses[-1] < losses[0]


if __name__ == "__main__":
    main()
