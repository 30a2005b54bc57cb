"""The whole road on real data: scikit-learn's handwritten digits, a small conv net, each transform
where it is of use.

1. the gradient of the loss as one readable graph;
2. per-sample gradients, checked against a loop, clipped and noised for differentially private SGD;
3. training through a forward and a backward graph, split where the least memory is kept;
4. what that split keeps;
5. time per step beside plain autograd and torch.func.

It leaves a page, ``build/demo/index.html``: the loss, the norms of gradients, what the split keeps
and the times as plots, and the graphs of a step to look around in.
"""

import io
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.live import Live
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close

from aotfunc import (
    aot_function,
    default_partition,
    functional_call,
    grad,
    jit,
    make_fx,
    min_cut_rematerialization_partition,
    show,
    vmap,
)

console = Console()
BATCH = 64


def load():
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,), in a fixed random order: 1,437 to train on,
    360 to test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


net = make_net()  # only its structure is used; parameters are arguments everywhere below


def loss(params, images, labels):
    """The mean loss of a batch."""
    return nn.functional.cross_entropy(functional_call(net, params, images), labels)


def loss_of_one(params, image, label):
    """The loss of one image (1, 8, 8); ``vmap`` makes a batch of it."""
    return loss(params, image[None], label[None])


per_sample_grads = vmap(grad(loss_of_one), in_dims=(None, 0, 0))


def accuracy(params, images, labels) -> float:
    with torch.no_grad():
        return (functional_call(net, params, images).argmax(1) == labels).double().mean().item()


def autograd_gradient(params, images, labels):
    """The reference: plain autograd."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    return dict(
        zip(leaves, torch.autograd.grad(loss(leaves, images, labels), list(leaves.values())))
    )


def autograd_gradients_by_loop(params, images, labels):
    each = [
        autograd_gradient(params, image[None], label[None]) for image, label in zip(images, labels)
    ]
    return {name: torch.stack([g[name] for g in each]) for name in params}


def show_gradient_graph(params, images, labels):
    console.rule("1. the gradient of the loss, as a graph")
    gm = make_fx(grad(loss))(params, images, labels)
    print(gm.code.strip())
    assert_close(
        gm(params, images, labels), autograd_gradient(params, images, labels), rtol=1e-4, atol=1e-6
    )


def clipped_and_noised(grads, clip: float, noise: float):
    """What DP-SGD steps along: per-sample gradients cut to norm ``clip``, averaged, with Gaussian
    noise."""
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    scale = (clip / norms).clamp(max=1)
    average = {}
    for name, g in grads.items():
        total = torch.einsum("n,n...->...", scale, g)
        average[name] = (total + noise * clip * torch.randn_like(total)) / len(norms)
    return average, norms, scale


def private_steps(params, images, labels, steps: int):
    console.rule("2. per-sample gradients, and differentially private SGD")
    grads = per_sample_grads(params, images[:BATCH], labels[:BATCH])
    assert_close(
        grads,
        autograd_gradients_by_loop(params, images[:BATCH], labels[:BATCH]),
        rtol=1e-4,
        atol=1e-5,
    )
    _, norms, scale = clipped_and_noised(grads, clip=1.0, noise=0.5)
    assert (norms * scale <= 1 + 1e-5).all()
    print(
        f"{BATCH} gradients by vmap(grad) equal a loop of autograd; norms {norms.min():.2f} to "
        f"{norms.max():.2f}"
    )

    before = loss(params, images, labels).item()
    for _ in range(steps):
        drawn = torch.randint(len(images), (BATCH,))
        grads = per_sample_grads(params, images[drawn], labels[drawn])
        step, _, _ = clipped_and_noised(grads, clip=1.0, noise=0.5)
        params = {name: p - 0.5 * step[name] for name, p in params.items()}
    after = loss(params, images, labels).item()
    print(
        f"{steps} steps, each sample's gradient clipped to norm 1, noise 0.5: loss {before:.2f} "
        f"-> {after:.2f}"
    )
    assert after < before
    return norms


class Keep:
    """A compiler that runs the graphs as they are, and keeps them to look at."""

    def __init__(self):
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        return gm.forward


def train(params, images, labels, test, epochs: int):
    console.rule("3. training through a forward and a backward graph")
    kept = Keep()
    step_loss = aot_function(loss, kept, partition_fn=min_cut_rematerialization_partition)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    table = Table("epoch", "loss", "unseen digits right", "ms per step")
    losses = []
    with Live(table, console=console):
        for epoch in range(epochs):
            start, steps = time.perf_counter(), 0
            for drawn in torch.randperm(len(images)).split(BATCH):
                if len(drawn) < BATCH:
                    continue  # a smaller last batch would be one more signature to compile
                optimizer.zero_grad()
                value = step_loss(leaves, images[drawn], labels[drawn])
                value.backward()
                optimizer.step()
                losses.append(value.item())
                steps += 1
            schedule.step()
            took = 1000 * (time.perf_counter() - start) / steps
            mean = statistics.mean(losses[-steps:])
            right = f"{100 * accuracy(leaves, *test):.1f} %"
            table.add_row(f"{epoch + 1}", f"{mean:.3f}", right, f"{took:.1f}")
    trained = {name: p.detach() for name, p in leaves.items()}
    score = accuracy(trained, *test)
    console.print()  # a live table ends without a new line where there is no terminal
    print(f"{epochs} epochs: {100 * score:.1f} % of {len(test[0])} unseen digits are right")
    assert len(kept.graphs) == 2, "one forward graph and one backward graph for all steps"
    return trained, score, losses, kept.graphs


def residuals(forward: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """What the forward keeps for the backward: its outputs after the loss, without what is an
    input anyway."""
    outputs = forward.graph.output_node().args[0]
    return [node for node in dict.fromkeys(outputs[1:]) if node.op != "placeholder"]


def kilobytes(nodes) -> float:
    return sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in nodes) / 1024


def show_residuals(params, images, labels, min_cut: torch.fx.GraphModule):
    console.rule("4. what the forward keeps for the backward")
    kept = Keep()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    aot_function(loss, kept, partition_fn=default_partition)(leaves, images, labels).backward()
    default = residuals(kept.graphs[0])
    saved = residuals(min_cut)
    for node in saved:
        val = node.meta["val"]
        print(
            f"  {node.name:<20} {str(val.dtype)[6:]:<8} {tuple(val.shape)!s:<18} "
            f"{kilobytes([node]):8.1f} KiB"
        )
    print(
        f"min-cut keeps {len(saved)} values, {kilobytes(saved):.0f} KiB; the default "
        f"{kilobytes(default):.0f} KiB"
    )
    assert kilobytes(saved) <= kilobytes(default)
    return {"min-cut": saved, "default": default}


def median_ms(contestants: dict, rounds: int) -> dict[str, float]:
    """Milliseconds per call, the median over rounds in which all take turns (a busy machine is
    busy for all)."""
    for f in contestants.values():
        f()
        f()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, f in contestants.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(ts) for name, ts in times.items()}


def show_times(params, images, labels, rounds: int):
    console.rule("5. milliseconds per step (medians, taking turns)")
    batch = params, images, labels
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    compiled = aot_function(loss, partition_fn=min_cut_rematerialization_partition)

    def aot_step():
        return torch.autograd.grad(compiled(leaves, images, labels), list(leaves.values()))

    reference = torch.func.grad(loss)
    reference_per_sample = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
    jitted, jitted_per_sample = jit(grad(loss)), jit(per_sample_grads)
    whole = {
        "plain autograd": lambda: autograd_gradient(*batch),
        "torch.func": lambda: reference(*batch),
        "aotfunc grad": lambda: grad(loss)(*batch),
        "aotfunc jit(grad)": lambda: jitted(*batch),
        "aotfunc aot_function, min-cut": aot_step,
    }
    each = {
        "plain autograd": lambda: autograd_gradients_by_loop(*batch),
        "torch.func": lambda: reference_per_sample(*batch),
        "aotfunc grad": lambda: per_sample_grads(*batch),
        "aotfunc jit(grad)": lambda: jitted_per_sample(*batch),
    }
    whole_ms, each_ms = median_ms(whole, rounds), median_ms(each, max(rounds // 4, 2))
    table = Table("", "gradient of the batch", "per-sample gradients")
    for name in whole:
        table.add_row(
            name, f"{whole_ms[name]:.2f}", f"{each_ms[name]:.2f}" if name in each_ms else ""
        )
    console.print(table)
    return whole_ms


def leave_page(folder: Path, params, batch, losses, norms, kept, times):
    """Write one page: plots of what was measured, and the graphs of a step."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (curve, histogram), (memory, bars) = figure.subplots(2, 2)
    curve.plot(losses, linewidth=0.8)
    curve.set(title="loss by step", yscale="log")
    histogram.hist(norms.tolist(), bins=16)
    histogram.set(title=f"norms of {BATCH} samples' gradients, at first")
    for partition, nodes in kept.items():
        left = 0.0
        for node in nodes:
            memory.barh(partition, kilobytes([node]), left=left, edgecolor="white")
            left += kilobytes([node])
    memory.set(title="KiB that the forward keeps, value by value")
    bars.barh(list(times), list(times.values()))
    bars.set(title="milliseconds per step")
    plots = io.StringIO()
    figure.savefig(plots, format="svg")
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    graphs = show(jit(loss), leaves, *batch, to=None)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "index.html"
    svg = plots.getvalue().partition("<svg")[2]
    body = f"<h1>Digits</h1>\n<svg{svg}\n<h2>A step</h2>\n{graphs._repr_html_()}"
    head = "<!doctype html>\n<meta charset='utf-8'>\n<title>aotfunc: digits</title>"
    file.write_text(f"{head}\n{body}\n", encoding="utf-8")
    print(f"{file}: look at it in a browser")


def main(quick: bool = False, folder: Path = Path("build/demo")):
    torch.manual_seed(0)
    (images, labels), test = load()
    params = {name: p.detach().clone() for name, p in make_net().named_parameters()}
    batch = images[:BATCH], labels[:BATCH]

    show_gradient_graph(params, *batch)
    norms = private_steps(params, images, labels, steps=10 if quick else 40)
    trained, score, losses, (forward, _) = train(
        params, images, labels, test, epochs=2 if quick else 20
    )
    assert score > (0.7 if quick else 0.95), score
    kept = show_residuals(trained, *batch, forward)
    times = show_times(trained, *batch, rounds=3 if quick else 60)
    leave_page(folder, trained, batch, losses, norms, kept, times)


if __name__ == "__main__":
    main()
