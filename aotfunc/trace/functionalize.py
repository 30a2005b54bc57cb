"""Make a functional graph of a recording: no node of it mutates or aliases.

A recording without writes is copied as it is; else :mod:`.values` says which node is a tensor's
current value. :mod:`.marks` make autograd's intent explicit, so that it survives rewriting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import Line
from ..progress import with_progress
from .emit import Builder, displaced
from .marks import hidden_write
from .records import flat_tensors, n_new_values, written_slots
from .scalars import FORMS, NUMBER
from .shapes.instr import Instr
from .shapes.sig import Sig, fill
from .tracer import Trace
from .values import ValueNodes, View
from .views import COMPUTED, Link, replay_view
from .writes import WRITES, functional_twin

aten = torch.ops.aten

#: in place, comparisons have derivative zero in both arguments; autograd does not see logical ops
COMPARISONS = frozenset(
    getattr(packet, name)
    for packet in (aten.eq_, aten.ne_, aten.lt_, aten.le_, aten.gt_, aten.ge_)
    for name in ("Scalar", "Tensor")
)
TRUTH = COMPARISONS | {getattr(aten, f"logical_{n}_").default for n in ("and", "or", "xor", "not")}


class Functionalizer(ValueNodes):
    """A builder of the functional graph of one recording."""

    def run(self) -> None:
        records = with_progress("ops written as a graph", self.trace.records)
        merge, hooked = self.b.merge, {s.old for s in self.trace.stand_ins if s.hooks}
        for i, (instr, refs, grad, region, line) in enumerate(records):
            self.b.meta = {"line": line} if region is None else {"line": line, "region": region}
            if i in self.trace.named:
                self.b.meta["named"] = self.trace.named[i]
            if hooked:  # ops with hooks stay apart, see Builder.node
                made = range(self.number, self.number + n_new_values(instr))
                self.b.merge = merge and hooked.isdisjoint(
                    [*made, *(refs[s] for s in written_slots(instr))]
                )
            if instr.__class__ is not Instr:
                instr.emit(self, refs, grad, line)
            elif instr.facts.writes:
                self._write(instr, refs, grad, line, i in self.trace.autograd.overwritten)
            elif self.mutates and instr.facts.view_of is not None:
                self._view(instr, refs, grad)
            else:
                nodes = self._nodes(instr, refs, grad)
                self._results(
                    self._call(instr, nodes), instr.outs, grad, self.how_cut(instr, refs)
                )
        self.b.meta, self.b.merge = {}, merge

    def _nodes(self, instr: Instr, refs: Sequence[int], grad: bool) -> list[Any]:
        """Return the nodes of an op's tensors, and of its number unless it is a literal."""
        nodes: list[Any] = [self.read(r, grad) for r in refs]
        if instr.number is torch.float32 and scalar_of(nodes) is None:
            i = instr.sigs.index(NUMBER)
            nodes[i] = self.b.call(aten._to_copy.default, nodes[i], dtype=instr.number)
        return nodes

    def _call(self, instr: Instr, nodes: list[Node]) -> Any:
        if not self.intent and instr.op is aten.detach.default:
            return nodes[0]
        if instr.op in COMPUTED:
            return replay_view(
                self.b,
                Link((instr.op, fill(instr.args, nodes)[1:], {}, None, instr.outs)),
                nodes[0],
            )
        if instr.number is not None and scalar_of(nodes) is None:
            return FORMS[instr.op](self.b.call, *nodes)
        kwargs = {k: fill(v, nodes) for k, v in instr.kwargs.items()} if instr.kwargs else {}
        args, outs = fill(instr.args, nodes), instr.outs
        if any(map(displaced, instr.sigs, nodes)):
            args, outs = self.b.again(instr.op, args, kwargs, outs)
        return self.b.node(instr.op, args, kwargs, outs)

    def _results(
        self, out: Any, outs: Any, grad: bool, how: OpOverload = aten.detach.default
    ) -> None:
        if outs.__class__ is Sig:
            self.bind(out, grad, how)
        elif isinstance(outs, tuple):
            for i, o in enumerate(outs):
                if flat_tensors(o):
                    self._results(self.b.item(out, i), o, grad, how)

    def _view(self, instr: Instr, refs: tuple, grad: bool) -> None:
        """Bind results to views of the first tensor's storage; another says where they start."""
        base = self.env[refs[0]]
        outs = instr.outs
        if not self.intent and instr.op is aten.detach.default:
            self.env[self.number] = View(base.storage, base.chain)
            self.number += 1
            return
        if outs is base.sig and instr.op in SAME_IF_EQUAL:  # `y[:]`
            self.env[self.number] = View(base.storage, base.chain)
            if refs[0] in self.cut or (not grad and outs.differentiable):
                self.cut[self.number] = self.how_cut(instr, refs)
            self.number += 1
            return
        each = [(None, outs)] if outs.__class__ is Sig else enumerate(outs)
        args = instr.args[1:]
        if len(refs) > 1:
            args = fill(instr.args, [None, *[self.read(r, grad) for r in refs[1:]]])[1:]
        for i, sig in each:
            ref = self.number
            self.number += 1
            self.env[ref] = self.seen(base, instr.op, args, instr.kwargs, i, sig)
            # detach is itself a cut
            cut = refs[0] in self.cut and instr.op is not aten.detach.default
            if cut or (not grad and sig.differentiable):
                self.cut[ref] = self.how_cut(instr, refs)

    def _write(
        self, instr: Instr, refs: tuple, grad: bool, line: Line | None, overwritten: bool
    ) -> None:
        op, facts = instr.op, instr.facts
        if facts.reshapes:
            self.env[refs[0]] = self.seen(
                self.env[refs[0]],
                functional_twin(op, line),
                instr.args[1:],
                instr.kwargs,
                None,
                instr.outs,
            )
            return
        nodes = self._nodes(instr, refs, grad)
        slots = [
            instr.args[i] if i < len(instr.args) else instr.kwargs[facts.names[i]]
            for i in facts.writes
        ]
        written = [
            refs[int(s)]
            for slot in slots
            for s in (slot if isinstance(slot, list | tuple) else [slot])
        ]
        special = WRITES.get(op)
        if special is not None:
            news = [
                special(
                    self.b,
                    *fill(instr.args, nodes),
                    **{k: fill(v, nodes) for k, v in instr.kwargs.items()},
                )
            ]
        else:
            twin = functional_twin(op, line)
            news = self._twin_results(twin, instr, nodes)
        # clone, so that a read of the copy is not a read of its source
        if op is aten.copy_.default and not self.direct:
            news[0] = self.b.call(aten.clone.default, news[0])
        if self.intent and grad and op in TRUTH and nodes[0].meta["val"].differentiable:
            news[0] = self.truth(op, nodes, news[0])
        if overwritten:
            news[0] = self.still_requiring_grad(nodes[0], news[0], written[0])
        for ref, new in zip(written, news[-len(written) :], strict=True):
            self.write(ref, new, grad, line)
        # results other than the written arguments
        extra = news[: len(news) - len(written)] if len(news) > len(written) else []
        outs = instr.outs if isinstance(instr.outs, tuple) else (instr.outs,)
        fresh = [o for o, same in zip(outs, facts.same, strict=False) if same is None]
        for new, o in zip(extra, fresh, strict=False):
            self._results(self.fitted(new, o) if o.__class__ is Sig else new, o, grad)

    def truth(self, op: OpOverload, nodes: list[Node], new: Node) -> Node:
        """Return a tensor of numbers with the truth values of ``op`` written to it."""
        old, *others = nodes
        if op in COMPARISONS:
            old = self.b.call(aten.mul.Tensor, old, 0)
            for x in others:
                if x.meta["val"].differentiable:
                    zero = self.fitted(self.b.call(aten.mul.Tensor, x, 0), old.meta["val"])
                    old = self.b.call(aten.add.Tensor, old, zero)
        return self.b.node(
            hidden_write, (old, self.fitted(new, old.meta["val"])), {}, old.meta["val"]
        )

    def still_requiring_grad(self, old: Node, new: Node, ref: int) -> Node:
        """Return the new value of an overwritten tensor that still requires grad: the derivative
        of the old value is zero. For a view it is the base's, zero at the view's elements."""
        new = self.fitted(new, old.meta["val"])
        if ref in self.trace.autograd.reach().bases:
            sig: Sig = old.meta["val"]
            everywhere = self.b.call(
                aten.full.default, list(sig.shape), True, dtype=torch.bool, device=sig.device
            )
            zeros = self.b.call(aten.masked_fill.Scalar, old, everywhere, 0)
        else:
            zeros = self.b.call(aten.zero.default, old)
        both = self.b.call(aten.add.Tensor, zeros, new)
        return self.b.node(hidden_write, (both, new), {}, new.meta["val"])

    def _twin_results(self, twin: OpOverload, instr: Instr, nodes: list[Node]) -> list:
        if instr.number is not None and scalar_of(nodes) is None:
            return [FORMS[twin](self.b.call, *nodes)]
        names = {a.name for a in twin._schema.arguments}
        ours = instr.op._schema.arguments
        args = [a for a, s in zip(instr.args, ours, strict=False) if s.name in names]
        kwargs = {k: v for k, v in instr.kwargs.items() if k in names}
        out = self.b.call(
            twin, *[fill(a, nodes) for a in args], **{k: fill(v, nodes) for k, v in kwargs.items()}
        )
        if isinstance(out, Node) and isinstance(out.meta["val"], tuple):
            return [self.b.item(out, i) for i in range(len(out.meta["val"]))]
        return [out]


def input_nodes(trace: Trace, builder: Builder, names: Sequence[str] = ()) -> list[Node]:
    """Return a placeholder for each input and each lifted tensor of a recording."""
    made = []
    count, sigs = len(trace.inputs), trace.signatures()
    for i, sig in enumerate(sigs[:count]):
        made.append(
            builder.placeholder(names[i] if i < len(names) else f"arg{i}", sig, role="primal")
        )
    for i, (t, sig) in enumerate(zip(trace.lifted, sigs[count:], strict=True)):
        kind = "param" if isinstance(t, torch.nn.Parameter) else "const"
        made.append(builder.placeholder(f"{kind}{i}", sig, role=kind))
    return made


def scalar_of(values: Sequence[Any]) -> float | None:
    """Return the Python number among an op's values; None if a node has taken its place."""
    return next((v for v in values if v.__class__ is float or v.__class__ is int), None)


#: views that show the same tensor if their result has its signature
SAME_IF_EQUAL = (aten.slice.Tensor, aten.view.default, aten.alias.default)
