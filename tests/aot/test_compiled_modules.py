"""A compiled module is indexed, and takes hooks, as the module is."""

import copy

import pytest
import torch
from torch import nn

from aotfunc import aot_module


def test_containers_are_indexed():
    """As the original is: layers are read, exchanged, appended to and iterated over."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    compiled, x = aot_module(net, "eager"), torch.randn(2, 3)
    torch.testing.assert_close(compiled(x), net(x))
    assert compiled[0] is net[0] and len(compiled) == 3 and list(compiled) == list(net)
    compiled[1] = nn.ReLU()
    del compiled[2]
    assert len(net) == 2
    torch.testing.assert_close(compiled(x), net[0](x).relu())
    copied = copy.deepcopy(compiled)
    assert copied[0] is not net[0] and len(copied) == 2
    compiled += nn.Sequential(nn.Tanh())
    torch.testing.assert_close(compiled(x), net[0](x).relu().tanh())
    assert len(net) == 3 and "orig_module" not in net._modules and len(compiled + compiled) == 6
    with pytest.raises(TypeError):
        len(aot_module(nn.Linear(3, 3), "eager"))


#: how hooks are registered on a module
HOOKS = {
    "forward_pre": lambda m, say: m.register_forward_pre_hook(say),
    "forward": lambda m, say: m.register_forward_hook(say),
    "full_backward_pre": lambda m, say: m.register_full_backward_pre_hook(say),
    "full_backward": lambda m, say: m.register_full_backward_hook(say),
    "state_dict_pre": lambda m, say: m.register_state_dict_pre_hook(say),
    "state_dict_post": lambda m, say: m.register_state_dict_post_hook(say),
    "load_state_dict_pre": lambda m, say: m.register_load_state_dict_pre_hook(say),
    "load_state_dict_post": lambda m, say: m.register_load_state_dict_post_hook(say),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_hooks(requires_grad):
    """Each kind of hook runs, in eager's order, until it is removed."""

    def said(net):
        calls, x = [], torch.ones(2, 3, requires_grad=requires_grad)
        handles = [
            register(net, lambda *_, kind=kind: calls.append(kind))
            for kind, register in HOOKS.items()
        ]
        for _ in range(2):
            net(x).sum().backward()
            net.load_state_dict(net.state_dict())
            for handle in handles:
                handle.remove()
        return calls

    found = said(aot_module(nn.Linear(3, 2), "eager"))
    assert found == said(nn.Linear(3, 2)) and {*found} == {*HOOKS}
