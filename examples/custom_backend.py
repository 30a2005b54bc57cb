"""A backend of your own in ten lines: a function from a graph to a callable.

A compiler receives a ``torch.fx.GraphModule`` of aten ops and example inputs, and returns
something to call in its place. Dynamo and functorch share this convention: what is written for
them works here, and the other way round."""

import operator
from collections import Counter

import torch

from aotfunc import aot_function, jit, min_cut_rematerialization_partition


def counting_compiler(log: list[Counter]):
    """A compiler that counts the ops of each graph it is given, and runs the graph as it is."""

    def compiler(gm: torch.fx.GraphModule, example_inputs):
        calls = (node.target for node in gm.graph.nodes if node.op == "call_function")
        ops = Counter(str(target) for target in calls if target is not operator.getitem)
        log.append(ops)
        print(
            f"graph {len(log)}: {len(example_inputs)} inputs, "
            + ", ".join(f"{op} x{n}" for op, n in ops.items())
        )
        return gm.forward

    return compiler


def gated(x, w, v):
    return (torch.sigmoid(x @ w) * torch.tanh(x @ v)).sum()


def main(quick: bool = False):
    torch.manual_seed(0)
    x = torch.randn(16, 8, dtype=torch.float64)
    w, v = (torch.randn(8, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    want = gated(x, w, v)
    want_grads = torch.autograd.grad(want, (w, v))

    print("jit: one graph for one signature")
    log: list[Counter] = []
    fast = jit(gated, backend=counting_compiler(log))
    for _ in range(3):
        torch.testing.assert_close(fast(x, w.detach(), v.detach()), want.detach())
    assert len(log) == 1, "the second call and the third must reuse the first one's graph"
    assert log[0]["aten.mm.default"] == 2

    print("aot_function: a forward graph and a backward graph")
    log = []
    split = aot_function(
        gated, counting_compiler(log), partition_fn=min_cut_rematerialization_partition
    )
    for _ in range(3):
        loss = split(x, w, v)
        torch.testing.assert_close(torch.autograd.grad(loss, (w, v)), want_grads)
    assert len(log) == 2, "forward and backward, compiled once each"
    forward, backward = log
    assert forward["aten.mm.default"] == 2 and backward["aten.mm.default"] == 2
    print("results and gradients equal eager's")


if __name__ == "__main__":
    main()
