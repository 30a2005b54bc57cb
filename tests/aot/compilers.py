"""A compiler that watches: how often it is called, which ops run inside what it compiled, and
which outside."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.depth = 0, 0
        self.inside, self.outside, self.modules = set(), set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        (self.inside if self.depth else self.outside).add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def compiler(self, gm, example_inputs):
        self.calls += 1
        self.modules.append(gm)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        assert len(placeholders) == len(example_inputs)
        for n, x in zip(placeholders, example_inputs):
            val = n.meta["val"]
            if isinstance(x, torch.Tensor):
                assert (val.shape, val.dtype, val.device) == (x.shape, x.dtype, x.device), n.name

        def run(*args):
            self.depth += 1
            try:
                return gm(*args)
            finally:
                self.depth -= 1

        return run
