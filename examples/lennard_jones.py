"""Forces are the negative gradient of an energy; a learnt energy is fitted to forces through that
gradient.

The loss holds a first derivative (with respect to positions) and is differentiated once more (with
respect to parameters): force matching is a second-order problem, and here it is written as it
reads."""

import torch
from torch import nn
from torch.testing import assert_close

from aotfunc import functional_call, grad, grad_and_value, jacrev, vmap

EPSILON, SIGMA = 0.5, 1.0


def pair_energy(r):
    """Lennard-Jones: repulsion when close, attraction when far."""
    s6 = (SIGMA / r) ** 6
    return 4 * EPSILON * (s6 * s6 - s6)


def cluster_energy(positions):
    """The energy of atoms at ``positions`` (n, 3): the sum over pairs."""
    i, j = torch.triu_indices(len(positions), len(positions), 1)
    return pair_energy(torch.linalg.vector_norm(positions[i] - positions[j], dim=1)).sum()


def cluster_forces_by_hand(positions):
    """The reference: F_i = sum_j 24 eps (2 (s/r)^12 - (s/r)^6) / r^2 (x_i - x_j)."""
    d = positions[:, None] - positions
    r2 = d.square().sum(-1) + torch.eye(len(positions))
    s6 = (SIGMA**2 / r2) ** 3
    return (24 * EPSILON * (2 * s6 * s6 - s6) / r2)[..., None].mul(d).sum(1)


def forces_of_a_cluster():
    grid = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    positions = 1.2 * grid + 0.05 * torch.randn_like(grid)
    forces = -grad(cluster_energy)(positions)
    assert_close(forces, cluster_forces_by_hand(positions))
    assert_close(forces.sum(0), torch.zeros(3, dtype=torch.float64))
    print(f"{len(positions)} atoms: forces equal the formula by hand, and sum to zero")

    # A translation of all atoms costs nothing, so the Hessian (the stiffness matrix) has three
    # zero modes.
    stiffness = jacrev(grad(cluster_energy))(positions).reshape(24, 24)
    assert_close(stiffness, stiffness.T)
    shift = torch.eye(3, dtype=torch.float64).repeat(8, 1)
    assert (stiffness @ shift).abs().max() < 1e-9 * stiffness.abs().max()
    print("stiffness matrix: symmetric, and blind to translations")


class PairPotential(nn.Module):
    """A network from a displacement (3,) to an energy; it sees only 1/r, so its forces are radial
    by construction."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def forward(self, displacement):
        return self.net(1 / torch.linalg.vector_norm(displacement, keepdim=True)).squeeze(-1)


def true_energy(displacement):
    return pair_energy(torch.linalg.vector_norm(displacement))


def energy_and_force(energy):
    """A function that returns ``energy``'s value and the force, its negative gradient."""

    def both(displacement):
        slope, value = grad_and_value(energy)(displacement)
        return value, -slope

    return both


def force_matching(steps: int):
    directions = nn.functional.normalize(torch.randn(64, 3, dtype=torch.float64), dim=1)
    pairs = directions * torch.linspace(0.98, 2.5, 64, dtype=torch.float64)[:, None]
    energies, forces = vmap(energy_and_force(true_energy))(pairs)

    model = PairPotential().double()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def mismatch(e, f):
        return (e - energies).square().mean() + (f - forces).square().sum(1).mean()

    def loss(params, pairs):
        def energy(d):
            return functional_call(model, params, d)

        return mismatch(*vmap(energy_and_force(energy))(pairs))

    # The second-order gradient against plain autograd with create_graph.
    leaf = pairs.clone().requires_grad_()
    out = torch.stack([model(d) for d in leaf])
    (slope,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    reference_grads = torch.autograd.grad(mismatch(out, -slope), list(model.parameters()))
    assert_close(tuple(grad(loss)(params, pairs).values()), reference_grads)
    print("gradient of the force-matching loss: equal to autograd with create_graph")

    step = grad_and_value(loss)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = None
    for _ in range(steps):
        grads, value = step({name: p.detach() for name, p in leaves.items()}, pairs)
        first = value.item() if first is None else first
        for name, p in leaves.items():
            p.grad = grads[name]
        optimizer.step()
        schedule.step()
    print(f"loss {first:.2f} -> {value.item():.5f} after {steps} steps of force matching")
    assert value.item() < first / 10

    # Distances that were not trained on.
    r = torch.linspace(1.0, 2.4, 57, dtype=torch.float64)
    unseen = r[:, None] * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    trained = {name: p.detach() for name, p in leaves.items()}
    _, learnt = vmap(energy_and_force(lambda d: functional_call(model, trained, d)))(unseen)
    _, true = vmap(energy_and_force(true_energy))(unseen)
    error = ((learnt - true).norm() / true.norm()).item()
    print(f"forces at unseen distances: {100 * error:.1f} % off")
    return error


def main(quick: bool = False):
    torch.manual_seed(0)
    forces_of_a_cluster()
    error = force_matching(steps=150 if quick else 1500)
    assert error < (0.5 if quick else 0.05), error


if __name__ == "__main__":
    main()
