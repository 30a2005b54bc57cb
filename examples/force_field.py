"""A force field that conserves energy: a network's energy, whose slope is trained on forces.

Forces are the negative gradient of the energy by construction, so a trajectory keeps its energy
whatever the network has learnt. The loss holds those forces, and a step differentiates them once
more. The energy is a compiled module; autograd differentiates it twice."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from aotfunc import aot_module


def distances(positions: Tensor) -> Tensor:
    """Those of all pairs of atoms, of each of a batch of clusters."""
    i, j = torch.triu_indices(positions.shape[1], positions.shape[1], 1)
    return (positions[:, i] - positions[:, j]).norm(dim=-1)


def morse_energy(positions: Tensor) -> Tensor:
    """The truth: a bond between each pair, of length 1."""
    return (1 - torch.exp(-1.5 * (distances(positions) - 1))).square().sum(1)


class Energy(nn.Module):
    """A sum over pairs of what a network makes of their distance."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(0.4, 3, 16))
        self.net = nn.Sequential(
            *(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, 1),
        )

    def forward(self, positions: Tensor) -> Tensor:
        near = torch.exp(-8 * (distances(positions)[..., None] - self.centres).square())
        return self.net(near).sum((1, 2))


def energy_and_forces(energy: Callable, positions: Tensor, train: bool = True) -> tuple:
    positions = positions.detach().requires_grad_()
    value = energy(positions)
    (slope,) = torch.autograd.grad(value.sum(), positions, create_graph=train)
    return value, -slope


def clusters(count: int, atoms: int = 4) -> Tensor:
    return torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])[:atoms] + 0.15 * (
        torch.randn(count, atoms, 3)
    )


def train(compiled: Callable, steps: int) -> tuple[Tensor, Callable]:
    torch.manual_seed(0)
    energy = compiled(Energy())
    optimizer = torch.optim.Adam(energy.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        positions = clusters(32)
        true, pull = energy_and_forces(morse_energy, positions, train=False)
        value, forces = energy_and_forces(energy, positions)
        loss = (forces - pull).square().mean() + 0.1 * (value - true.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses), energy


def drift(energy: Callable, steps: int, dt: float = 0.01) -> float:
    """The largest change of the total energy on a trajectory of unit masses (velocity Verlet)."""
    torch.manual_seed(2)
    x, v = clusters(1), 0.1 * torch.randn(1, 4, 3)
    potential, force = energy_and_forces(energy, x, train=False)
    totals = []
    for _ in range(steps):
        v = v + 0.5 * dt * force
        x = x + dt * v
        potential, force = energy_and_forces(energy, x, train=False)
        v = v + 0.5 * dt * force
        totals.append(potential.item() + 0.5 * v.square().sum().item())
    return max(totals) - min(totals)


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

    losses, energy = train(aot_module, 150 if quick else 2000)
    positions = clusters(100)
    _, right = energy_and_forces(morse_energy, positions, train=False)
    _, forces = energy_and_forces(energy, positions, train=False)
    error = ((forces - right).norm() / right.norm()).item()
    change = drift(energy, 100 if quick else 1000)
    print(
        f"loss {losses[0]:.2f} -> {losses[-1]:.5f}; "
        f"forces on new clusters {100 * error:.1f} % off; "
        f"a trajectory's energy changes by {change:.1e}"
    )
    assert error < (0.5 if quick else 0.1), error
    assert change < 0.02


if __name__ == "__main__":
    main()
