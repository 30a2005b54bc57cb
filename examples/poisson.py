"""A differential equation solved by a network (a PINN): its Laplacian is in the loss.

-Δu = f in the unit square, u = 0 on its border, for the f whose solution is known. The loss takes
second derivatives with respect to the place, and a step a third one with respect to the
parameters: here the whole loss is compiled, derivatives and all, and eager computes the same."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from aotfunc import functional_call, grad, hessian, jit, vmap


def solution(x: Tensor) -> Tensor:
    return torch.sin(torch.pi * x[..., 0]) * torch.sin(torch.pi * x[..., 1])


def source(x: Tensor) -> Tensor:
    return 2 * torch.pi**2 * solution(x)


class Membrane(nn.Module):
    """A network that is zero on the border of the unit square by construction."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
            nn.Linear(width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1) * (x * (1 - x)).prod(-1)


def eager_loss(net: nn.Module, x: Tensor) -> Tensor:
    """The mean square of Δu + f, in plain PyTorch."""
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0] for i in (0, 1)]
    return (second[0][:, 0] + second[1][:, 1] + source(x.detach())).square().mean()


def residual(net: nn.Module) -> Callable[[dict, Tensor], Tensor]:
    """``(parameters, x) -> Δu(x) + f(x)`` at one place, by transforms."""

    def of(params: dict, x: Tensor) -> Tensor:
        u = lambda x: functional_call(net, params, (x,))
        return hessian(u)(x).diagonal().sum() + source(x)

    return of


def train(loss: Callable, net: nn.Module, steps: int) -> Tensor:
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(torch.rand(256, 2))
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.detach())
    return torch.stack(losses)


def membrane() -> Membrane:
    torch.manual_seed(0)
    return Membrane()


def main(quick: bool = False):
    same = 20
    found, seconds = {}, {}
    for name in ("eager", "autograd, compiled", "transforms, compiled"):
        net = membrane()
        params = dict(net.named_parameters())
        by_sample = vmap(residual(net), in_dims=(None, 0))
        loss = {
            "eager": lambda x, net=net: eager_loss(net, x),
            "autograd, compiled": jit(lambda x, net=net: eager_loss(net, x)),
            "transforms, compiled": jit(
                lambda x, f=by_sample, params=params: f(params, x).square().mean()
            ),
        }[name]
        train(loss, net, 2)  # compilers, and what optimizers import
        net.load_state_dict(membrane().state_dict())
        start = time.process_time()
        found[name] = train(loss, net, same)
        seconds[name] = (time.process_time() - start) / same
        assert_close(found[name], found["eager"], rtol=1e-3, atol=1e-3)
        print(f"{name}: {1e3 * seconds[name]:.2f} ms a step, losses equal to eager's")

    net = membrane()
    losses = train(jit(lambda x: eager_loss(net, x)), net, 100 if quick else 2000)
    places = torch.rand(1000, 2)
    with torch.no_grad():
        error = (net(places) - solution(places)).norm() / solution(places).norm()
    slope = vmap(grad(net))(places)  # the network is an ordinary function still
    print(
        f"loss {losses[0]:.1f} -> {losses[-1]:.4f}; u is {100 * error:.2f} % off, "
        f"its steepest slope {slope.norm(dim=1).max():.2f} (π is right)"
    )
    assert error < (0.5 if quick else 0.01), error


if __name__ == "__main__":
    main()
