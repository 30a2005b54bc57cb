"""Jacobians, Hessians and their products with vectors, for one point and for a batch of points.

``jacrev`` builds a Jacobian row by row (cheap for few outputs), ``jacfwd`` column by column (cheap
for few inputs), and ``hessian`` is one of each. Products with a vector need no matrix at all."""

import torch
from torch.testing import assert_close

from aotfunc import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap


def rosenbrock(x):
    """A curved valley with its minimum, 0, at (1, ..., 1)."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def main(quick: bool = False):
    torch.manual_seed(0)
    f64 = {"dtype": torch.float64}
    w, b = torch.randn(4, 6, **f64), torch.randn(4, **f64)
    x, xs = torch.randn(6, **f64), torch.randn(32, 6, **f64)

    def layer(x):
        return torch.tanh(w @ x + b)

    # d tanh(u) = (1 - tanh(u)^2) du, so the Jacobian is known by hand.
    by_hand = (1 - layer(x) ** 2)[:, None] * w
    assert_close(jacrev(layer)(x), by_hand)
    assert_close(jacfwd(layer)(x), by_hand)
    print(
        f"Jacobian of tanh(Wx + b): {tuple(by_hand.shape)}, jacrev and jacfwd agree with the "
        "formula"
    )

    batched = vmap(jacrev(layer))(xs)
    assert_close(
        batched, torch.stack([torch.autograd.functional.jacobian(layer, row) for row in xs])
    )
    print(f"for a batch of points: {tuple(batched.shape)}, equal to a loop of torch.autograd's")

    h = hessian(rosenbrock)(x)
    assert_close(h, torch.autograd.functional.hessian(rosenbrock, x))
    assert_close(jacrev(jacrev(rosenbrock))(x), h)
    assert_close(jacfwd(jacfwd(rosenbrock))(x), h)
    print(
        f"Hessian of Rosenbrock's function: {tuple(h.shape)}, the same by any two of jacfwd and "
        "jacrev"
    )

    v = torch.randn(6, **f64)
    _, forward_over_reverse = jvp(grad(rosenbrock), (x,), (v,))
    _, pull = vjp(grad(rosenbrock), x)
    (reverse_over_reverse,) = pull(v)
    assert_close(forward_over_reverse, h @ v)
    assert_close(reverse_over_reverse, h @ v)
    print("Hessian-vector product: without the Hessian, by jvp of grad and by vjp of grad")

    def newton_step(x):
        return x - torch.linalg.solve(hessian(rosenbrock)(x), grad(rosenbrock)(x))

    # All starting points at once; near the minimum each step doubles the number of right digits.
    points = 1 + 0.1 * torch.randn(8, 2, **f64)
    distances = []
    for _ in range(8):
        points = vmap(newton_step)(points)
        distances.append((points - 1).abs().max().item())
    assert distances[-1] < 1e-9
    print(
        "Newton's method, 8 points at once, distance to the minimum: "
        + ", ".join(f"{d:.0e}" for d in distances)
    )


if __name__ == "__main__":
    main()
