"""Compiled modules some of whose parts are under ``fully_shard``, beside eager ones and beside one
process on the whole batch; called by :mod:`.processes`."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from aotfunc import aot_module, jit, make_fx, vmap
from aotfunc.errors import CaptureError
from tests.aot.dtensors import whole
from tests.sweeps import every

close = torch.testing.assert_close


class Model(nn.Module):
    """Layers of uneven sizes, one called twice and one recomputed, and tied weights."""

    fails = False

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        layer = lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6), nn.LayerNorm(6))
        self.layers = nn.ModuleList([layer() for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        for layer in *self.layers[:2], self.layers[0]:
            x = layer(x)
        if self.fails:
            raise ValueError("of the model")
        return self.head(checkpoint(self.layers[2], x, use_reentrant=False))


def each_layer(m, **how):
    for layer in m.layers:
        fully_shard(layer, **how)
    return fully_shard(m, **how)


def without_root(m):
    for layer in m.layers:
        fully_shard(layer)
    return m


def in_groups(m):
    fully_shard([m.layers[0], m.layers[1]])
    return fully_shard(m)


def frozen(m):
    m.layers[0][0].weight.requires_grad_(False)
    return each_layer(m)


def mixed(param, reduce, output=None):
    inner = MixedPrecisionPolicy(param, reduce)
    outer = MixedPrecisionPolicy(param, reduce, output)

    def sharded(m):
        for layer in m.layers:
            fully_shard(layer, mp_policy=inner)
        return fully_shard(m, mp_policy=outer)

    return sharded


def columns(m):
    places = lambda p: Shard(p.ndim - 1) if p.shape[-1] % 2 == 0 else Shard(0)
    return each_layer(m, shard_placement_fn=places)


def ahead(m):
    """Layers are gathered before their calls, by hand and by a plan."""
    each_layer(m).layers[1].set_modules_to_forward_prefetch([m.layers[2]])
    m.layers[0].register_forward_pre_hook(lambda *_: (m.layers[1].unshard(async_op=True), None)[1])
    return m


def divided(m, **how):
    """Gradients are sums over all processes, divided by numbers of one's own."""
    for k, x in enumerate(reversed(list(each_layer(m, **how).modules()))):
        if isinstance(x, FSDPModule):
            x.set_force_sum_reduction_for_comms(True)  # all that gloo has
            x.set_gradient_divide_factor(1.0 + k)
    return m


def offloaded(m):
    return each_layer(m, offload_policy=CPUOffloadPolicy(pin_memory=False))


BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
#: how a model is sharded; a normal run takes each second one
WAYS = {
    "each layer": each_layer,
    "without root": without_root,
    "in groups": in_groups,
    "frozen": frozen,
    "columns": columns,
    "ahead": ahead,
    "kept": lambda m: each_layer(m, reshard_after_forward=False),
    "never kept": lambda m: each_layer(m, reshard_after_forward=True),
    "float64": mixed(F64, None),
    "offloaded": offloaded,
    "divided": divided,
    "bfloat16": mixed(BF16, F32, F32),
}


def trained(net, tokens):
    """The results of steps of training, and whole gradients and parameters."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    results, states = [], []
    for _ in range(2):
        optimizer.zero_grad()
        results.append(net(tokens))
        results[-1].square().mean().backward()
        states += gradients(net)
        if len({isinstance(p, DTensor) for p in net.parameters()}) == 1:
            nn.utils.clip_grad_norm_(net.parameters(), 0.5, foreach=True)
        optimizer.step()
        states += [whole(p).detach().clone() for p in net.parameters()]
    return results, states


def gradients(net):
    found = [p for p in net.parameters() if p.requires_grad]
    assert all(p.grad.placements == p.placements for p in found if isinstance(p, DTensor))
    return [whole(p.grad).clone() for p in found]


def check_ways(rank, count, start, tokens):
    """Results, gradients and steps are those of eager modules that are sharded alike."""
    mine, ways = tokens[rank * 2 :][:2], WAYS
    if count == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("all", "parts"))
        sharded = lambda m: each_layer(m, mesh=mesh)
        ways = {"two dimensions": sharded, "divided": lambda m: divided(m, mesh=mesh)}
    _, plain = trained(copy.deepcopy(start), tokens)
    for name in every(2, ways) if count == 2 else ways:
        way = ways[name]
        compiled = aot_module(way(copy.deepcopy(start)), "eager")
        ours, theirs = trained(compiled, mine), trained(way(copy.deepcopy(start)), mine)
        near = {"rtol": 2e-2, "atol": 2e-2} if name == "bfloat16" else {}
        close(ours, theirs, **near, msg=lambda m, name=name: f"{name}: {m}")
        if name in ("each layer", "two dimensions"):
            close(ours[1], plain)


def idle(net):
    """All modules are as between two eager calls."""
    for m in net.modules():
        if isinstance(m, FSDPModule):
            state = m._get_fsdp_state()
            assert state._training_state.name == "IDLE"
            assert state._state_ctx.iter_forward_root is None
    return all(isinstance(p, DTensor) for p in net.parameters())


def check_calls(rank, count, start, tokens):
    """Compiled and eager calls of one module follow each other, with and without gradients, on
    batches of other sizes in each process; second derivatives are those of one process."""
    plain, net = copy.deepcopy(start), each_layer(copy.deepcopy(start))
    layer = net.layers[0]
    jit(lambda: layer[0].weight * layer[0].in_features)()  # and is not the outermost one by that
    compiled = aot_module(net, "eager", memory_budget=0.3)
    loss, mine = (lambda m, x: m(x).square().mean()), tokens[rank * 2 :][:2]
    loss(plain, tokens).backward()
    expected = gradients(plain)
    loss_of = jit(lambda x: loss(net, x), "eager")
    for ways in ((net,), (compiled,), (net, compiled), (compiled, compiled)):
        net.zero_grad()
        sum(loss(way, mine) for way in ways).backward()
        close(gradients(net), [g * len(ways) for g in expected])
        with torch.no_grad():
            close(ways[0](mine), plain(mine))
        net.reshard()  # eager calls without gradients leave the parameters whole
    close([whole(g) for g in torch.autograd.grad(loss_of(mine), [*net.parameters()])], expected)
    assert idle(net)
    other = each_layer(copy.deepcopy(start))
    for size in (1 + 2 * rank, 3 - 2 * rank):
        for way in other, compiled:
            way.zero_grad()
            loss(way, tokens[:size]).backward()
        close(gradients(net), gradients(other))
    for m in plain, compiled:
        m.zero_grad()
        x = mine if m is compiled else tokens
        found = torch.autograd.grad(loss(m, x), [*m.parameters()], create_graph=True)
        sum(whole(g).square().sum() for g in found).backward()
    close(gradients(net), gradients(plain), rtol=1e-4, atol=1e-4)
    fresh = each_layer(copy.deepcopy(start))
    once = jit(lambda x: loss(fresh, x), "eager")
    assert once(mine) == once(mine) and once.captures == 1
    inside = each_layer(copy.deepcopy(start))
    inside.layers[1] = aot_module(inside.layers[1], "eager")
    loss(inside, mine).backward()
    assert len(gradients(inside)) == len(expected)
    close(
        dict(zip(names(inside), gradients(inside), strict=True)),
        dict(zip(names(plain), expected, strict=True)),
    )


def check_accumulation(rank, start, tokens):
    """Gradients of several batches, reduced with those of the last one, are eager's."""
    ways = (each_layer(copy.deepcopy(start)) for _ in range(3))
    eager, compiled, mixed = next(ways), aot_module(next(ways), "eager"), next(ways)
    by_turns = aot_module(mixed, "eager")
    for net, calls in (
        (eager, (eager, eager, eager)),
        (compiled, (compiled, compiled, compiled)),
        (mixed, (by_turns, mixed, mixed)),
    ):
        for i, call in enumerate(calls):
            net.set_requires_gradient_sync(i == 2)
            call(tokens[2 * rank :][: 1 + (i > 0)]).square().sum().backward()
    close([gradients(compiled), gradients(mixed)], [gradients(eager)] * 2)
    assert compiled._compiled.captures == 2  # one for a batch of one


def names(m):
    return [n for n, _ in m.named_parameters()]


def check_refused(start, tokens):
    """What a recording does not know, or cannot do, leaves the module as it was."""
    net = each_layer(copy.deepcopy(start))
    compiled = aot_module(net, "eager")
    hooked = aot_module(each_layer(copy.deepcopy(start)), "eager")
    hooked.get_submodule("layers.1").register_full_backward_hook(lambda m, given, g: None)
    net.set_requires_gradient_sync(False)
    net(tokens).sum().backward()
    net.set_requires_gradient_sync(True)
    with pytest.raises(CaptureError, match="gradients of eager calls that are not reduced yet"):
        compiled(tokens)
    net(tokens).sum().backward()
    net.set_requires_all_reduce(False)
    with pytest.raises(CaptureError, match=r"set_requires_all_reduce\(False\)"):
        compiled(tokens)
    net.set_requires_all_reduce(True)
    by_others = "called by compiled functions"
    for error, words, call in (
        (CaptureError, by_others, lambda: make_fx(net)(tokens)),
        (CaptureError, by_others, lambda: vmap(net)(tokens[None])),
        (CaptureError, "go to compiled functions", lambda: jit(lambda x: compiled(x))(tokens)),
        (CaptureError, "torch.func's transforms", lambda: torch.func.vmap(compiled)(tokens[None])),
        (CaptureError, "hooks inside of it", lambda: hooked(tokens)),
        (ValueError, "of the model", lambda: compiled(tokens)),
    ):
        net.fails = error is ValueError
        with pytest.raises(error, match=words):
            call()
        assert idle(net)
    net.fails = False
    close(compiled(tokens), start(tokens))


def check_fully_sharded(rank, count):
    torch.manual_seed(0)
    start, tokens = Model(), torch.randint(0, 11, (2 * count, 3))
    check_ways(rank, count, start, tokens)
    if count == 2:
        check_calls(rank, count, start, tokens)
        check_accumulation(rank, start, tokens)
        check_refused(start, tokens)
