"""What can go wrong in a partition, one test for each: draws, effects, mutation, aliases, sizes,
casts, order."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from aotfunc.partition import (
    PartitionError,
    default_partition,
    min_cut_rematerialization_partition,
    nbytes,
    residuals,
    table,
    verify,
)
from aotfunc.partition.ops import is_random, is_symbol
from tests.partition.joints import Hand, JointOf, aten, doubled, kept_bytes, saved, sig, targets

cheapest = functools.partial(min_cut_rematerialization_partition, price=0.0)
PARTITIONS = [default_partition, min_cut_rematerialization_partition, cheapest]
every = pytest.mark.parametrize("partition", PARTITIONS, ids=["default", "min_cut", "least saved"])


def x(*shape: int) -> torch.Tensor:
    torch.manual_seed(len(shape))
    return torch.randn(*(shape or (4, 5))).requires_grad_()


# ----- draws -------------------------------------------------------------------------------------

DRAWS = {
    "dropout": lambda a, b: aten.native_dropout((a @ b).sin(), 0.5, True)[0].exp(),
    "bernoulli": lambda a, b: torch.bernoulli(torch.full_like(a, 0.5)) * a.sin() + b,
    "rand_like": lambda a, b: (torch.rand_like(a) * a).exp() * b,
    "randn": lambda a, b: (torch.randn(5, 5) @ a).tanh() * b,
    "randperm": lambda a, b: a[torch.randperm(5)].sin() * b,
    "normal": lambda a, b: (torch.normal(torch.zeros(5, 5), torch.ones(5, 5)) * a).sin() * b,
    "multinomial": lambda a, b: a.sin()[torch.multinomial(torch.ones(5), 4, True)] @ b,
    "two of the same": lambda a, b: torch.rand_like(a) * a.sin() + torch.rand_like(a) * b.sin(),
    "noise from a view": lambda a, b: (torch.rand(5, 5, 2)[:, :, 0] * a).exp() * b,
}


@every
@pytest.mark.parametrize("name", DRAWS)
def test_draws_run_once(name: str, partition: object) -> None:
    joint = JointOf(DRAWS[name], x(5, 5), x(5, 5))
    drawn = [n.target for n in joint.module.graph.nodes if is_random(n)]
    fw, bw = joint.check(partition)
    assert [n.target for n in fw.graph.nodes if is_random(n)] == drawn
    assert not [n for n in bw.graph.nodes if n.op == "call_function" and is_random(n)]


def test_dead_draws_stay_in_order() -> None:
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    h(aten.rand.default, [4])  # it is not read
    noise = h(aten.rand.default, [4])  # the backward alone reads it
    out = h(aten.sin.default, a)
    fw, bw = min_cut_rematerialization_partition(
        h.module([out, h(aten.mul.Tensor, t, noise)]), num_fwd_outputs=1
    )
    assert targets(fw)[:2] == [aten.rand.default] * 2
    assert [n.name for n in saved(fw, 1)] == ["rand_1"]


@pytest.mark.parametrize("p, again", [(0.0, True), (0.3, False)])
def test_attention_is_random_only_with_dropout(p: float, again: bool) -> None:
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    h = Hand(1, 2, 8, 4)
    q, t = h.input("q"), h.input("t", "tangent")
    both = h(op, q, q, q, p, val=(sig(1, 2, 8, 4), sig(1, 2, 8)))
    assert is_random(both) is not again
    out = h.item(both, 0)
    late = h(aten.mul.Tensor, h(aten.exp.default, out), t)
    fw, bw = cheapest(h.module([out, late]), num_fwd_outputs=1)
    assert (op in targets(bw)) is again
    dropout = h.graph.call_function(aten.native_dropout.default, (q, 0.5, False))
    assert not is_random(dropout)


# ----- effects, mutation -------------------------------------------------------------------------

log: list[str] = []


def announce(value: torch.Tensor) -> torch.Tensor:
    log.append("announce")
    return value.clone()


@every
@pytest.mark.parametrize("mark", ["effect", "random"])
def test_marked_callables_run_once(mark: str, partition: object) -> None:
    """Any callable may be a node; what its metadata does not mark may run again."""
    for marked in (True, False):
        h = Hand()
        a, t = h.input("a"), h.input("t", "tangent")
        seen = h(announce, a, **({mark: True} if marked else {}))
        out = h(aten.sin.default, seen)
        gm = h.module([out, h(aten.mul.Tensor, t, h(aten.cos.default, seen))])
        fw, bw = partition(gm, num_fwd_outputs=1)  # type: ignore[operator]
        log.clear()
        a_value = torch.randn(4)
        bw(*fw(a_value)[1:], torch.ones(4))
        again = partition is cheapest and not marked
        assert log == ["announce"] * (1 + again)


@every
def test_checks_without_a_reader_stay(partition: object) -> None:
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    h(
        aten._assert_async.msg,
        h(aten.all.default, a, val=sig(dtype=torch.bool)),
        "all must be set",
        val=(),
    )
    h(aten._assert_async.msg, h(aten.all.default, t, val=sig(dtype=torch.bool)), "late", val=())
    gm = h.module([h(aten.sin.default, a), h(aten.mul.Tensor, t, h(aten.cos.default, a))])
    fw, bw = partition(gm, num_fwd_outputs=1)  # type: ignore[operator]
    assert (
        targets(fw).count(aten._assert_async.msg) == targets(bw).count(aten._assert_async.msg) == 1
    )
    with pytest.raises(RuntimeError, match="all must be set"):
        fw(torch.zeros(4))


@every
def test_input_that_is_overwritten_is_saved_as_a_copy(partition: object) -> None:
    h = Hand()
    a, t = h.input("a", mutated=True), h.input("t", "tangent")
    gm = h.module([h(aten.add.Tensor, a, 1), h(aten.mul.Tensor, t, h(aten.cos.default, a))])
    fw, bw = partition(gm, num_fwd_outputs=1)  # type: ignore[operator]
    value = torch.randn(4)
    wanted = value.cos()
    new, *kept = fw(value)
    value.copy_(new)
    assert torch.equal(bw(*kept, torch.ones(4))[0], wanted)


def test_what_only_the_backward_may_do_stays_there() -> None:
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    seen = h(announce, a, effect=True, phase="backward")
    gm = h.module([h(aten.sin.default, a), h(aten.mul.Tensor, t, seen)])
    fw, bw = default_partition(gm, num_fwd_outputs=1)
    assert announce not in targets(fw) and announce in targets(bw)


def test_mutation_is_refused() -> None:
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    b = h(aten.sin.default, a, line="b = a.sin()")
    h(aten.add_.Tensor, b, 1, line="b += 1")
    with pytest.raises(PartitionError, match=r"add_ = aten.add_.Tensor \(b \+= 1\) writes"):
        default_partition(h.module([b, h(aten.mul.Tensor, t, b)]), num_fwd_outputs=1)


@torch.library.custom_op("partition_test::twice", mutates_args=())
def twice(a: torch.Tensor) -> torch.Tensor:
    return a * 2


def test_unknown_ops_run_once() -> None:
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    b = h(torch.ops.partition_test.twice.default, a)
    gm = h.module([h(aten.sin.default, b), h(aten.mul.Tensor, t, h(aten.cos.default, b))])
    fw, bw = cheapest(gm, num_fwd_outputs=1)
    assert torch.ops.partition_test.twice.default not in targets(bw)


# ----- aliases, tuples, constants ----------------------------------------------------------------


@every
def test_storage_is_saved_not_its_views(partition: object) -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = (a @ b).relu()
        return (y.t().sin() @ y.view(-1, 5)).exp() + y[:4, :4].cos()[0, 0]

    joint = JointOf(f, x(4, 5), x(5, 5))
    fw, bw = joint.check(partition)
    plain = [p.detach() for p in joint.primals]
    kept = [r for r in fw(*plain)[1:]]
    assert len({r.untyped_storage().data_ptr() for r in kept}) == len(kept)
    assert all(r.untyped_storage().nbytes() == r.numel() * r.element_size() for r in kept)


@every
def test_tuples_are_never_saved(partition: object) -> None:
    def f(a: torch.Tensor) -> torch.Tensor:
        values, where = a.sin().max(1)
        first, second = values.exp().split(2)
        return first * second + where[:2]

    fw, bw = JointOf(f, x()).check(partition)
    assert not [n for n in saved(fw, 1) if isinstance(n.meta["val"], tuple | list)]


@every
def test_constants_are_shared_not_saved(partition: object) -> None:
    root = torch.nn.Module()
    root.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    mask = (
        h.graph.get_attr("mask")
        if hasattr(h.graph, "owner")
        else h.graph.create_node("get_attr", "mask")
    )
    mask.meta["val"] = h.val
    b = h(aten.exp.default, h(aten.mul.Tensor, a, mask))
    gm = h.module([b, h(aten.mul.Tensor, h(aten.mul.Tensor, t, b), mask), mask], root)
    fw, bw = partition(gm, num_fwd_outputs=1)  # type: ignore[operator]
    assert fw.mask is bw.mask is root.mask
    assert "mask" not in [n.name for n in saved(fw, 1)]
    value = torch.randn(4)
    out, *kept = fw(value)
    grad, same = bw(*kept, torch.ones(4))
    assert torch.equal(grad, (value * root.mask).exp() * root.mask) and same is root.mask


# ----- gradients that are not much ---------------------------------------------------------------


@every
def test_gradients_none_constant_or_input(partition: object) -> None:
    h = Hand()
    a, b, t = h.input("a"), h.input("b"), h.input("t", "tangent")
    zeros = h(aten.full.default, [4], 0.0)
    gm = h.module([b, a, b, None, zeros, a, t, None])
    fw, bw = partition(gm, num_fwd_outputs=3)  # type: ignore[operator]
    u, v, s = torch.randn(3, 4)
    y1, y2, y3, *kept = fw(u, v)
    assert y1 is v and y2 is u and y3 is v
    none, zero, same, tangent, last = bw(*kept, s)
    assert none is None and last is None and not zero.any() and same is u and tangent is s


@every
def test_no_cotangents_no_gradients(partition: object) -> None:
    h = Hand()
    a, _ = h.input("a"), h.input("b")
    joint = h.module([h(aten.sin.default, a), None, None])
    fw, bw = partition(joint, num_fwd_outputs=1)
    assert not saved(fw, 1) and not bw.graph.find_nodes(op="placeholder")
    assert bw() == (None, None) and len(fw(torch.ones(4), torch.ones(4))) == 1


def test_output_of_a_cotangent_is_an_error() -> None:
    h = Hand()
    t = h.input("tangents_1", role=None)
    with pytest.raises(PartitionError, match=r"forward output sin .* depends on a cotangent"):
        default_partition(h.module([h(aten.sin.default, t), None]), num_fwd_outputs=1)


# ----- sizes and casts ---------------------------------------------------------------------------


@every
def test_sizes_are_saved_as_numbers(partition: object) -> None:
    """A tensor that the backward needs for its size alone is not saved for that."""
    joint = JointOf(lambda a, b: a.sum(0) + b.exp(), x(3, 5), x(5), mode="symbolic")
    fw, bw = joint.check(partition)
    handed = saved(fw, 1)
    numbers = [n for n in handed if is_symbol(n)]
    assert (
        numbers
        and handed[-len(numbers) :] == numbers
        and "primals_1" not in [n.name for n in handed]
    )
    assert 3 in fw(*[p.detach() for p in joint.primals])[-len(numbers) :]

    joint = JointOf(lambda a: (a.exp() @ a.t()).sum((0, 1)), x(3, 5), mode="symbolic")
    fw, bw = joint.check(partition)
    assert not [n for n in saved(fw, 1) if n.target is aten.mm.default]


def test_the_cut_chooses_among_casts() -> None:
    """One of the wide and the narrow value is saved, never both; casts of weights are redone."""

    def f(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return a.exp().bfloat16() @ w.bfloat16()

    joint = JointOf(f, x(8, 16), x(16, 16), params=[1])
    fw, _ = joint.check(default_partition)
    assert {n.meta["val"].dtype for n in saved(fw, 1) if n.op != "placeholder"} == {
        torch.float32,
        torch.bfloat16,
    }
    fw, _ = joint.check(min_cut_rematerialization_partition)
    assert kept_bytes(fw, 1) == 0


# ----- checkpoints -------------------------------------------------------------------------------


def checkpointed(key: str, blocks: int = 3) -> torch.fx.GraphModule:
    """A chain of regions, each ``sin(exp(sin(x @ w)))`` with a dropout inside."""
    h = Hand(4, 4)
    a, w, t = h.input("a"), h.input("w"), h.input("t", "tangent")
    values = []
    for k in range(blocks):
        mark = {key: k}
        product = h(aten.mm.default, a, w, **mark)
        noise = h(aten.rand.default, [4, 4], **mark)
        inner = h(aten.exp.default, h(aten.mul.Tensor, product, noise, **mark), **mark)
        values.append((product, noise, inner))
        a = h(aten.sin.default, inner, **mark)
    out = h(aten.mul.Tensor, a, a)
    g = h(aten.mul.Tensor, t, a)
    for product, noise, inner in reversed(values):
        g = h(aten.mul.Tensor, h(aten.mul.Tensor, g, h(aten.cos.default, inner)), inner)
        g = h(
            aten.mm.default,
            h(aten.mul.Tensor, h(aten.mul.Tensor, g, noise), product),
            h(aten.t.default, w),
        )
    return h.module([out, g])


@pytest.mark.parametrize("partition", PARTITIONS[:2], ids=["default", "min_cut"])
@pytest.mark.parametrize("key", ["recompute", "region"])
def test_checkpointed_regions_are_computed_again(partition: object, key: str) -> None:
    """As eager does: the input of each region and its draws are saved, nothing else; the inside
    runs again."""
    gm = checkpointed(key)
    fw, bw = partition(gm, num_fwd_outputs=1)  # type: ignore[operator]
    names = [n.name for n in saved(fw, 1)]
    assert names == ["a", "w", "rand", "sin", "rand_1", "sin_1", "rand_2", "sin_2"]
    assert [n.target for n in doubled(fw, bw)].count(aten.mm.default) == 3
    assert {r.name: r.reason for r in residuals(fw)}["sin_1"] == "border of a checkpointed region"
    order = [n.name for n in bw.graph.nodes]
    assert (
        order.index("exp_2") < order.index("exp_1") < order.index("exp")
    )  # each right before it is read

    torch.manual_seed(1)
    wanted = gm(*torch.ones(3, 4, 4).unbind())
    torch.manual_seed(1)
    out, *kept = fw(*torch.ones(2, 4, 4).unbind())
    assert torch.equal(out, wanted[0]) and torch.equal(bw(*kept, torch.ones(4, 4))[0], wanted[1])


# ----- order, determinism ------------------------------------------------------------------------


def test_values_live_shortest() -> None:
    """Saved values that only the backward reads stand after their last input; recomputed ones
    before their reader."""
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    values = [h(aten.mm.default, a, a)]
    for _ in range(3):
        values.append(h(aten.mm.default, values[-1], a))
    grads = t
    for v in reversed(values):
        half = h(aten._to_copy.default, h(aten.cos.default, v), val=sig(4, dtype=torch.float16))
        grads = h(aten.mul.Tensor, grads, half)
    fw, _ = default_partition(h.module([values[-1], grads]), num_fwd_outputs=1)
    names = [n.name for n in fw.graph.nodes]
    for v in values:
        assert names[names.index(v.name) + 1].startswith("cos") and names[
            names.index(v.name) + 2
        ].startswith("_to")

    joint = JointOf(lambda a: functools.reduce(lambda v, _: v.sin(), range(8), a).sum(), x())
    _, bw = joint.check(min_cut_rematerialization_partition)
    order = [n.target for n in bw.graph.nodes if n.op == "call_function"]
    cosines = [i for i, target in enumerate(order) if target is aten.cos.default]
    assert cosines[-1] - cosines[0] > 8


def test_the_backward_keeps_little() -> None:
    """What takes more memory than it frees runs right before it is read, what takes less at once;
    what runs once, where it stood."""
    orders = {False: ["sin", "sum_1", "mul", "add"], True: ["mul", "sin", "sum_1", "add"]}
    for once, order in orders.items():
        h = Hand()
        a, t = h.input("a"), h.input("t", "tangent")
        large = h(aten.mul.Tensor, t, a, val=sig(64), **({"effect": True} if once else {}))
        small = h(aten.sum.default, h(aten.sin.default, t, val=sig(16)), val=sig(1))
        joint = h.module([a, h(aten.add.Tensor, large, small)])
        _, bw = default_partition(joint, num_fwd_outputs=1)
        assert [n.name for n in bw.graph.nodes if n.op == "call_function"] == order


@every
def test_early_values_are_returned_by_the_backward(partition: object) -> None:
    """One that is computed again, from another one that a cotangent meets, comes after it."""
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    b = h(aten.sin.default, a)
    c = h(aten.exp.default, b)
    joint = h.module([a, h(aten.mul.Tensor, t, b), c])
    fw, bw = partition(joint, num_fwd_outputs=1)  # type: ignore[operator]
    u, s = torch.randn(2, 4)
    same, *kept = fw(u)
    grad, again = bw(*kept, s)
    assert torch.equal(grad, s * u.sin()) and torch.equal(again, u.sin().exp()) and same is u


def test_same_graph_same_partition_in_every_process() -> None:
    script = """
        import sys; sys.path[:0] = sys.argv[1:]
        import torch; from tests.partition.joints import JointOf
        from aotfunc.partition import min_cut_rematerialization_partition as cut
        f = lambda a, b: ((a @ b).sin() * (b @ a).exp()).softmax(-1).tanh() + a.sort(1)[0]
        joint = JointOf(f, torch.ones(5, 5).requires_grad_(), torch.ones(5, 5).requires_grad_())
        codes = {"".join(m.code for m in cut(joint.module, num_fwd_outputs=1)) for _ in range(20)}
        assert len(codes) == 1
        print(codes.pop())
    """
    codes = set()
    for seed in ("0", "7"):
        run = subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(script),
                os.getcwd(),
            ],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        codes.add(run.stdout)
    assert len(codes) == 1


# ----- metadata, sizes, report -------------------------------------------------------------------


def test_metadata_is_kept() -> None:
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    b = h(aten.mm.default, a, a, line="y = x @ x", extra="kept")
    gm = h.module([b, h(aten.mul.Tensor, t, h(aten.sin.default, b, line="z"), line="dz")])
    fw, bw = default_partition(gm, num_fwd_outputs=1)
    metas = {n.name: n.meta for m in (fw, bw) for n in m.graph.nodes}
    assert (
        metas["mm"]["extra"] == "kept"
        and metas["mul"]["line"] == "dz"
        and metas["sin"]["line"] == "z"
    )
    assert (
        metas["a"]["role"] == "primal"
        and metas["t"]["role"] == "tangent"
        and metas["mm"]["role"] == "residual"
    )
    assert "role" not in b.meta


def test_bytes() -> None:
    assert (
        nbytes(sig(3, 4))
        == nbytes(torch.empty(3, 4))
        == nbytes(torch.empty(3, 4, device="meta"))
        == 48
    )
    assert nbytes(torch.empty(1, 4).expand(9, 4)) == nbytes(sig(9, 4, stride=(0, 1))) == 16
    assert (
        nbytes(sig(3, dtype=torch.complex128)) == 48
        and nbytes(sig(0, 5)) == 0
        and nbytes(sig()) == 4
    )
    assert nbytes((sig(2), None, 3)) == 16


def test_report() -> None:
    joint = JointOf(lambda a, w: F.relu(a @ w).exp().sum(), x(4, 5), x(5, 6), params=[1])
    fw, _ = joint.check(default_partition)
    found = {r.name: r for r in residuals(fw)}
    assert {r.reason for r in found.values()} == {"input", "parameter", "read by the backward"}
    assert sum(
        r.bytes for r in found.values() if r.reason == "read by the backward"
    ) == kept_bytes(fw, 1)
    text = table(found.values())
    assert (
        "2 inputs and parameters" in text.splitlines()[-1]
        and "[4, 6]" in text
        and "float32" in text
    )


def test_verify_runs_on_graphs_of_others() -> None:
    """A partition that repeats a draw is found out, also one of another partitioner."""
    h = Hand()
    a, t = h.input("a"), h.input("t", "tangent")
    noise = h(aten.rand_like.default, a)
    gm = h.module([h(aten.mul.Tensor, a, noise), h(aten.mul.Tensor, t, noise)])
    fw, bw = default_partition(gm, num_fwd_outputs=1)
    bad = Hand()
    b, s = bad.input("a"), bad.input("t", "tangent")
    bad_bw = bad.module([bad(aten.mul.Tensor, s, bad(aten.rand_like.default, b))])
    rename = {"mul": "mul_1"}
    for n in bad_bw.graph.nodes:
        n.name = rename.get(n.name, n.name)
    fw.graph.output_node().args = (
        (fw.graph.output_node().args[0][0], next(iter(fw.graph.nodes))),
    )
    with pytest.raises(
        PartitionError, match=r"rand_like .* runs in the forward and again in the backward"
    ):
        verify(fw, bad_bw, gm, num_fwd_outputs=1)
