"""What a compiled function does to tensors, nodes, modules and optimizers from outside happens at
every call, as in eager mode, or is refused and leaves them as they were."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import (
    clip_grad_norm_,
    parametrizations,
    parametrize,
    vector_to_parameters,
    weight_norm,
)

from aotfunc import aot_function, jit
from aotfunc.errors import AotfuncError

WAYS = {"jit": lambda f: jit(f, backend="eager"), "aot": lambda f: aot_function(f, "eager")}


def tenfold(grads, *_):
    return tuple(None if g is None else g * 10 for g in grads)


def of_module(m, grads, *_):
    return tenfold(grads)


class World:
    """What lies outside of the function."""

    def __init__(self):
        torch.manual_seed(0)
        self.leaf = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        self.computed = self.leaf * 2
        self.node = self.computed.grad_fn
        self.constant = torch.tensor([5.0, 6.0, 7.0])
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.of_leaf = self.leaf.register_hook(lambda g: g * 2)
        self.of_module = self.net[0].register_forward_hook(lambda m, args, out: out * 2)
        self.of_backward = self.net[0].register_full_backward_hook(of_module)
        for p in (self.leaf, *self.net.parameters()):
            p.grad = torch.ones_like(p)

    def loss(self, x):
        return (self.net(x) * self.leaf * self.computed * self.constant).sum()

    def picture(self):
        tensors = (self.leaf, self.computed, self.constant, *self.net.parameters())
        return [
            [(m.__class__, m.training, sorted(m.__dict__)) for m in self.net.modules()],
            [(len(m._forward_hooks), len(m._backward_hooks)) for m in self.net.modules()],
            [n for n, _ in (*self.net.named_parameters(), *self.net.named_buffers())],
            [(t.requires_grad, t.is_leaf, t.retains_grad, len(t.__dict__)) for t in tensors],
            [len(t._backward_hooks or ()) for t in tensors],
            [None if t.grad_fn is None else dict(t.grad_fn.metadata) for t in tensors],
            [t.detach().clone() for t in (*tensors, *self.net.buffers())],
            [None if t.grad is None else t.grad.clone() for t in tensors if t.is_leaf],
            (len(self.optimizer.param_groups), self.optimizer.param_groups[0]["lr"]),
            (torch.is_grad_enabled(), torch.get_default_dtype()),
        ]


#: the effect, and the words with which it is refused; None where it happens at every call
EFFECTS = {
    "hook of a node": (lambda w: w.computed.grad_fn.register_hook(tenfold), None),
    "pre-hook of a node": (lambda w: w.computed.grad_fn.register_prehook(tenfold), None),
    "hook of a node that is kept": (lambda w: w.node.register_prehook(tenfold), None),
    "hook where gradients add up": (
        lambda w: w.node.next_functions[0][0].register_prehook(tenfold),
        None,
    ),
    "metadata of a node": (lambda w: w.node.metadata.update(n=len(w.node.metadata)), None),
    "metadata": (lambda w: w.computed.grad_fn.metadata.update(n=1), None),
    "gradient edge": (
        lambda w: get_gradient_edge(w.leaf).node.register_prehook(tenfold),
        "nodes of autograd's graph",
    ),
    "a tensor's hook": (lambda w: w.leaf.register_hook(tenfold), "during the capture only"),
    "a hook after accumulation": (
        lambda w: w.leaf.register_post_accumulate_grad_hook(lambda p: None),
        "during the capture only",
    ),
    "a hook removed": (lambda w: w.of_leaf.remove(), None),
    "a module's hook removed": (lambda w: w.of_module.remove(), None),
    "a module's backward hook removed": (lambda w: w.of_backward.remove(), None),
    "hooks removed": (lambda w: w.net[0]._forward_hooks.clear(), None),
    "retain_grad": (lambda w: w.computed.retain_grad(), None),
    "requires_grad_": (lambda w: w.constant.requires_grad_(), "during the capture only"),
    "requires_grad": (lambda w: setattr(w.constant, "requires_grad", True), None),
    "frozen": (lambda w: w.net.requires_grad_(False), "during the capture only"),
    "detach_": (lambda w: w.computed.detach_(), "during the capture only"),
    "grad = None": (lambda w: setattr(w.leaf, "grad", None), None),
    "del grad": (lambda w: delattr(w.leaf, "grad"), None),
    "grad.zero_()": (lambda w: w.leaf.grad.zero_(), None),
    "backward()": (lambda w: w.loss(torch.ones(1, 3)).backward(), "return the gradient"),
    "zero_grad of a module": (lambda w: w.net.zero_grad(), None),
    "zero_grad": (lambda w: w.optimizer.zero_grad(), None),
    "step": (lambda w: w.optimizer.step(), None),
    "a learning rate": (lambda w: w.optimizer.param_groups[0].update(lr=0.5), None),
    "clipped": (lambda w: clip_grad_norm_(w.net.parameters(), 0.1), None),
    "a module's forward hook": (
        lambda w: w.net[2].register_forward_hook(lambda m, args, out: out * 2),
        None,
    ),
    "a module's backward hook": (lambda w: w.net[2].register_full_backward_hook(of_module), None),
    "a module's backward pre-hook": (
        lambda w: w.net[2].register_full_backward_pre_hook(of_module),
        None,
    ),
    "eval": (lambda w: w.net.eval(), None),
    "a child": (lambda w: w.net.append(nn.Tanh()), None),
    "a child exchanged": (lambda w: w.net.__setitem__(1, nn.Sigmoid()), None),
    "a buffer": (lambda w: w.net.register_buffer("kept", torch.ones(3)), None),
    "a buffer of a layer": (lambda w: w.net[0].register_buffer("kept", torch.ones(3)), None),
    "a parameter": (lambda w: w.net.register_parameter("p", nn.Parameter(torch.ones(3))), None),
    "a weight bound anew": (
        lambda w: setattr(w.net[0], "weight", nn.Parameter(w.net[0].weight.detach() * 2)),
        "pass it as an argument",
    ),
    "an initialisation": (lambda w: w.net.apply(lambda m: fill(m, 0.5)), None),
    "load_state_dict": (
        lambda w: w.net.load_state_dict({k: v * 1.5 for k, v in w.net.state_dict().items()}),
        None,
    ),
    "another dtype": (lambda w: w.net.bfloat16().float(), r"\.grad was asked for"),
    "a parametrization": (
        lambda w: parametrize.register_parametrization(w.net[0], "weight", nn.Tanh()),
        "set_ changes",
    ),
    "weight_norm": (lambda w: parametrizations.weight_norm(w.net[0]), "leaves a ModuleDict"),
    "weight_norm, the old one": (lambda w: weight_norm(w.net[0]), "pass it as an argument"),
    "vector_to_parameters": (
        lambda w: vector_to_parameters(torch.ones(24), w.net.parameters()),
        None,
    ),
    "share_memory_": (lambda w: w.constant.share_memory_(), "set_ gives a tensor"),
    "swap_tensors": (
        lambda w: torch.utils.swap_tensors(w.constant, torch.ones(3)),
        "swap_tensors",
    ),
    "an attribute": (lambda w: setattr(w.leaf, "tag", getattr(w.leaf, "tag", 0) + 1), None),
    "written": (lambda w: w.leaf.data.add_(1), None),
    "gradients switched off": (lambda w: torch.set_grad_enabled(False), None),
    "a default dtype": (lambda w: torch.set_default_dtype(torch.float64), None),
}


def fill(m, value):
    if isinstance(m, nn.Linear):
        nn.init.constant_(m.weight, value)


def pictures(effect, wrap, anew):
    """After each of three calls and their backwards; the error, and what is there then."""
    w, found = World(), []

    def f(x):
        effect(w)
        return w.loss(x)

    compiled = wrap(f)
    try:
        for k in range(3):
            if anew and k:
                w.__dict__.update(World().__dict__)
            with torch.enable_grad():
                y = compiled(torch.ones_like(w.constant[None]) * (k + 1))
                found += [[y.detach().clone()], w.picture()]
                if y.requires_grad:
                    y.backward(retain_graph=True)
                    found.append(w.picture())
    except AotfuncError as e:
        return found, e, w.picture()
    finally:
        torch.set_default_dtype(torch.float32)
    return found, None, None


def equal(x, y):
    if isinstance(x, torch.Tensor):
        return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(equal, x, y))
    return x == y


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way, anew", [("jit", False), ("aot", True)])
@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect(name, way, anew):
    effect, why = EFFECTS[name]
    got, error, after = pictures(effect, WAYS[way], anew)
    if why is None:
        assert error is None
        assert equal(got, pictures(effect, lambda f: f, anew)[0])
    else:
        with pytest.raises(AotfuncError, match=why):
            raise error
        assert not got and equal(after, World().picture())
        assert why.startswith(("leaves", "pass it")) or "test_side_effects.py" in str(error)


def test_gradients_stay_switched_off_once_they_are():
    """As in eager: then the function finds what it leaves, and is not captured any more."""
    w = torch.ones(3, requires_grad=True)
    f = jit(lambda x: (torch.set_grad_enabled(False), x * w)[1])
    try:
        for _ in range(4):
            assert not f(torch.ones(3)).requires_grad and not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert f.captures == 2


def test_a_hook_needs_a_gradient():
    def f(x):
        h = x * 2
        h.register_hook(lambda g: g)
        return h

    for call in (f, jit(f), aot_function(f, "eager")):
        with pytest.raises(RuntimeError, match="cannot register a hook on a tensor that doesn't"):
            call(torch.ones(2))
