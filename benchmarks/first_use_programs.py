"""The programs of benchmarks/first_use.py, and one of them in this process.

python -m benchmarks.first_use_programs LIBRARY PROGRAM prints the seconds of processor time that
importing torch, importing the library and the program's first call took. Each entry of PROGRAMS
makes its data and returns the program, a function of the library (aotfunc or torch.func)."""

import importlib
import json
import sys
import time

started = time.process_time()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

imported = time.process_time()


def loss(x):
    return (x.sin() * x).sum()


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def parameters(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def squares(lib, module):
    return lambda p, x: lib.functional_call(module, p, (x,)).square().sum()


def gradient():
    x = torch.randn(8)
    return lambda lib: lib.grad(loss)(x)


def vjp():
    x = torch.randn(8)
    return lambda lib: lib.vjp(torch.sin, x)[1](x)


def jvp():
    x = torch.randn(8)
    return lambda lib: lib.jvp(torch.sin, (x,), (x,))


def linearize():
    x = torch.randn(8)
    return lambda lib: lib.linearize(torch.sin, x)[1](x)


def hessian():
    x = torch.randn(8)
    return lambda lib: lib.hessian(lambda x: loss(x).square())(x)


def jacrev():
    x = torch.randn(8)
    return lambda lib: lib.jacrev(lambda x: x.sin() * x.sum())(x)


def jacfwd():
    x = torch.randn(8)
    return lambda lib: lib.jacfwd(lambda x: x.sin() * x.sum())(x)


def hessian_vector_product():
    x = torch.randn(8)
    return lambda lib: lib.jvp(lib.grad(loss), (x,), (x,))


def per_sample_gradients():
    net, x, y = network(), torch.randn(6, 8), torch.randint(4, (6,))

    def run(lib):
        def one(p, x, y):
            return F.cross_entropy(lib.functional_call(net, p, (x[None],)), y[None])

        return lib.vmap(lib.grad(one), in_dims=(None, 0, 0))(parameters(net), x, y)

    return run


def ensemble():
    nets, x = [network() for _ in range(3)], torch.randn(2, 8)

    def run(lib):
        stacked, _ = lib.stack_module_state(nets)
        return lib.vmap(lib.grad(squares(lib, nets[0])), in_dims=(0, None))(stacked, x)

    return run


def maml():
    w, x, y = torch.randn(8, 2), torch.randn(3, 5, 8), torch.randn(3, 5)

    def run(lib):
        def error(w, x, y):
            return ((x @ w).tanh().sum(-1) - y).square().mean()

        def task(w, x, y):
            return error(w - 0.1 * lib.grad(error)(w, x, y), x, y)

        return lib.grad(lambda w: lib.vmap(task, in_dims=(None, 0, 0))(w, x, y).mean())(w)

    return run


def transformer():
    layer, x = (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        torch.randn(2, 3, 8),
    )
    return lambda lib: lib.grad(squares(lib, layer))(parameters(layer), x)


def convolution():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    x = torch.randn(2, 1, 8, 8)
    return lambda lib: lib.grad(squares(lib, net))(parameters(net), x)


def linear_algebra():
    a = torch.randn(4, 4)
    a, b = a @ a.mT + torch.eye(4), torch.ones(4)

    def f(a):
        return (
            torch.linalg.cholesky(a).logdet()
            + torch.linalg.eigvalsh(a).sum()
            + torch.linalg.solve(a, b).sum()
        )

    return lambda lib: lib.grad(f)(a)


def printed_graph():
    x = torch.randn(8)

    def run(lib):
        if lib is torch.func:
            from torch.fx.experimental.proxy_tensor import make_fx
        else:
            make_fx = lib.make_fx
        return make_fx(lib.grad(loss))(x).code

    return run


def compiled_training_step():
    w, x = torch.randn(8, 3, requires_grad=True), torch.randn(4, 8)

    def f(w, x):
        return (x @ w).tanh().sum()

    def run(lib):
        if lib is torch.func:
            from functorch.compile import aot_function, min_cut_rematerialization_partition, nop

            step = aot_function(f, nop, partition_fn=min_cut_rematerialization_partition)
        else:
            step = lib.aot_function(f, "eager")
        step(w, x).backward()

    return run


def forward_of_a_batch():
    w, x = torch.randn(8, 8), torch.randn(5, 8)
    return lambda lib: lib.vmap(lambda x: (w @ x).tanh())(x)


PROGRAMS = {
    f.__name__.replace("_", " "): f
    for f in (
        *(
            gradient,
            vjp,
            jvp,
            linearize,
            hessian,
            jacrev,
            jacfwd,
            hessian_vector_product,
            per_sample_gradients,
        ),
        *(
            ensemble,
            maml,
            transformer,
            convolution,
            linear_algebra,
            printed_graph,
            compiled_training_step,
        ),
    )
}
#: what torch.func has nothing to import for
BATCHES = {"vmap alone": forward_of_a_batch}

if __name__ == "__main__":
    library, name = sys.argv[1:]
    program = (PROGRAMS | BATCHES)[name]()
    ready = time.process_time()
    lib = importlib.import_module(library)
    loaded = time.process_time()
    program(lib)
    print(json.dumps([imported - started, loaded - ready, time.process_time() - loaded]))
