"""From a recording to a functional graph: nothing in it mutates and nothing aliases.

A recording that never writes is copied as it is. Otherwise every traced tensor is a *view*: a
storage (its current value is a node, and it counts versions) and a chain of view ops. A write to a
view computes the storage's new value through the inverses of the chain; a read through another
view replays that view's chain on the current value.

Intent is made explicit, so that it survives every later rewriting: a value made under
``torch.no_grad()`` and read outside passes through ``aten.detach``, a view made there through
``aotfunc.dead_end`` (it requires grad if what it shows does, and has no derivative), and a write
that autograd does not see becomes ``aotfunc.hidden_write(old, new)``: the new value with the old
derivative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..debug import Line, at
from ..errors import CaptureError
from .emit import Builder, displaced
from .memory import Place, overlaps_itself, part
from .records import flat
from .scalars import FIRST, NUMBER, with_tensor
from .shapes.instr import Instr
from .shapes.sig import Sig, contiguous_stride, fill
from .tracer import Trace
from .views import COMPUTED, Link, forward, inverse, laid_out, linked, restrided, strided
from .writes import WRITES, functional_twin

aten = torch.ops.aten

_library = torch.library.Library("aotfunc", "DEF")
_library.define("hidden_write(Tensor old, Tensor new) -> Tensor")
_library.impl("hidden_write", lambda old, new: new.clone(), "CompositeExplicitAutograd")
_library.define("once(Tensor x) -> Tensor")
_library.impl("once", lambda x: x.clone(), "CompositeExplicitAutograd")
_library.define("no_tangent(Tensor x) -> Tensor")
_library.impl("no_tangent", lambda x: x.clone(), "CompositeExplicitAutograd")
_library.define("check_gradient(Tensor x, str where) -> Tensor")
hidden_write = torch.ops.aotfunc.hidden_write.default
torch.library.register_autograd("aotfunc::hidden_write", lambda ctx, g: (g, None), lib=_library)
_library.define("dead_end(Tensor(a) x) -> Tensor(a)")
_library.impl("dead_end", torch.no_grad()(lambda x: x.view_as(x)), "CompositeImplicitAutograd")
dead_end = torch.ops.aotfunc.dead_end.default
no_tangent = torch.ops.aotfunc.no_tangent.default  # an identity without a forward-mode derivative
check_gradient = (
    torch.ops.aotfunc.check_gradient.default
)  # an identity that raises RuntimeError for a NaN
once = (
    torch.ops.aotfunc.once.default
)  # an identity that refuses to be differentiated: @once_differentiable


def _checked(x: torch.Tensor, where: str) -> torch.Tensor:
    if bool(x.isnan().any()):
        raise RuntimeError(f"a gradient has nan values{where}")
    return x.clone()


_library.impl("check_gradient", _checked, "CompositeExplicitAutograd")
_library.impl("check_gradient", lambda x, where: torch.empty_like(x), "Meta")

#: in place, comparisons have the derivative zero in both arguments; autograd sees nothing of
# logical ops
COMPARISONS = frozenset(
    getattr(packet, name)
    for packet in (aten.eq_, aten.ne_, aten.lt_, aten.le_, aten.gt_, aten.ge_)
    for name in ("Scalar", "Tensor")
)
TRUTH = COMPARISONS | {getattr(aten, f"logical_{n}_").default for n in ("and", "or", "xor", "not")}


class Memory:
    """What storages share whose derivatives are apart: the version, and which of them was written
    last."""

    __slots__ = ("first", "version", "writer")

    def __init__(self, first: Storage) -> None:
        self.version, self.first, self.writer = 0, first, first


class Storage:
    """What views share: the current value, as of a version of the memory; ``ref`` where it is an
    input or a lifted tensor, which shows it through ``chain``. A detached tensor begins another
    storage of the same memory."""

    __slots__ = ("chain", "cut", "memory", "node", "ref", "shown", "sig", "version", "written")

    def __init__(
        self, node: Node, ref: int | None = None, cut: bool = False, memory: Memory | None = None
    ) -> None:
        self.node, self.ref = node, ref
        self.memory = memory or Memory(self)
        self.version, self.written = self.memory.version, False
        self.sig: Sig = node.meta["val"]
        self.cut = cut  # made under no_grad
        self.chain: tuple[Link, ...] = ()
        self.shown: dict[int, tuple[int, Node]] = {}

    def seen_through(self, b: Builder, link: Link, node: Node) -> Node:
        """``node`` seen through a link of a view's chain: one node, that a view and the views of
        it depend on."""
        version, found = self.shown.get(id(link), (None, node))
        if version != self.version:
            found = forward(b, link, node)
            self.shown[id(link)] = self.version, found
        return found


class View:
    """A storage seen through a chain of view ops; remembers its node for the version it was read
    at."""

    __slots__ = ("chain", "node", "storage", "version")

    def __init__(self, storage: Storage, chain: tuple = (), node: Node | None = None) -> None:
        self.storage, self.chain = storage, chain
        self.node = storage.node if node is None and not chain else node
        self.version = storage.version if self.node is not None else -1

    @property
    def sig(self) -> Sig:
        return self.chain[-1][4] if self.chain else self.storage.sig


def covered(sigs: dict[int, Sig], places: Sequence[Place], base: int, i: int) -> tuple[Link, ...]:
    """How the input ``base`` shows the input ``i``, which lies inside of it."""
    if i == base or (sigs[i] is sigs[base] and places[i][:3] == places[base][:3]):
        return ()
    start = part(sigs[base], places[base], sigs[i], places[i])
    if start is None:
        raise CaptureError(
            "some of the tensors that are written to, or their neighbours, overlap in memory and "
            "none of them covers the others; pass the whole tensor and slice it inside, or clone "
            "them"
        )
    return (strided(sigs[base], sigs[i], start),)


class Functionalizer:
    """Builds the functional graph of one recording; ``read`` and ``write`` are what recorded steps
    of other layers need."""

    def __init__(
        self,
        trace: Trace,
        builder: Builder,
        inputs: Sequence[Node],
        intent: bool = True,
        numbers: Mapping[int, Node] = MappingProxyType({}),
    ) -> None:
        self.trace, self.b = trace, builder
        self.intent = intent  # False inside a derived rule: autograd's own detaches mean nothing
        self.env: dict[int, Any] = {
            FIRST - i: numbers.get(i, x) for i, x in enumerate(trace.numbers)
        }
        #: a view that was written, and a copy, are what was written; else they are read from the
        # memory they show
        self.direct = True
        self.cut: dict[
            int, OpOverload
        ] = {}  # made under no_grad, and how it is read where gradients are on
        self.cuts: dict[tuple, Node] = {}  # and one node each for that
        self.snapshots: list[list[Node]] = []  # arguments of the custom functions under way
        self.placeholders = list(inputs)
        refs = [*range(len(trace.inputs)), *(-1 - i for i in range(len(trace.lifted)))]
        self.mutates = trace.mutates
        self.number = len(trace.inputs)
        if not self.mutates:
            self.env.update(zip(refs, self.placeholders, strict=True))
        else:
            self._bind_storages(refs)

    def _bind_storages(self, refs: list[int]) -> None:
        places = self.trace.layout()
        groups: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            groups.setdefault(place.group, []).append(i)
        written = self.trace.roots().written
        for members in groups.values():
            if not any(refs[i] in written for i in members):  # only read: each stands for itself
                for i in members:
                    self.env[refs[i]] = View(Storage(self.placeholders[i], refs[i]))
                continue
            sigs: dict[int, Sig] = {i: self.placeholders[i].meta["val"] for i in members}
            base = max(
                members,
                key=lambda i: (sigs[i].stride == contiguous_stride(sigs[i].shape), sigs[i].numel),
            )
            memory = None
            for kin in dict.fromkeys((places[base].kin, *(places[i].kin for i in members))):
                mine = [i for i in members if places[i].kin == kin]
                memory = self._bind_kin(refs, mine, base, places, memory)

    def _bind_kin(
        self, refs: list[int], mine: list[int], base: int, places: Sequence[Place], memory: Any
    ) -> Memory:
        """A storage, laid out as the input ``base``, for inputs that autograd knows as views of
        one tensor."""
        sigs: dict[int, Sig] = {i: self.placeholders[i].meta["val"] for i in (*mine, base)}
        chains = {i: covered(sigs, places, base, i) for i in mine}
        first = base if base in mine else max(mine, key=lambda i: sigs[i].numel)
        node = self.placeholders[first]
        for link in chains[first]:  # what else the memory holds has no derivative here
            node = inverse(self.b, link, self.detached(self.placeholders[base]), node, None)
        storage = Storage(node, refs[first], memory=memory)
        storage.chain = chains[first]
        for i in mine:
            covered(sigs, places, first, i)
            self.env[refs[i]] = View(
                storage, chains[i], self.placeholders[i] if chains[i] else None
            )
        return storage.memory

    # ----- values --------------------------------------------------------------------------------

    def read(self, ref: int, grad: bool = True) -> Node:
        """The current value of a tensor; cut off if it was made under no_grad and is read where
        gradients are on."""
        view = self.env[ref]
        if view.__class__ is View:
            storage = view.storage
            if view.version != storage.memory.version:
                node = self.current(storage)
                for link in view.chain:
                    node = storage.seen_through(self.b, link, node)
                view.node, view.version = node, storage.version
            node = view.node
        else:
            node = view
        return self.cut_off(ref, node) if grad else node

    def cut_off(self, ref: int, node: Node) -> Node:
        how = self.cut.get(ref) if self.intent else None
        return node if how is None else self.detached(node, how)

    def current(self, storage: Storage) -> Node:
        """The value of a storage; where the memory was written through another one, the derivative
        stays."""
        memory = storage.memory
        if storage.version != memory.version:
            new = memory.writer.node
            while new.target is hidden_write:
                new = new.args[1]  # type: ignore[assignment]
            if storage.sig.differentiable:
                new = self.b.node(hidden_write, (storage.node, new), {}, new.meta["val"])
            storage.node = new
            storage.version = memory.version
        return storage.node

    def became(self, storage: Storage, node: Node) -> None:
        """The storage has another value from here on, and its memory."""
        memory = storage.memory
        memory.version, memory.writer = memory.version + 1, storage
        storage.node, storage.version, storage.written = node, memory.version, True

    def through(self, base: View, link: Link) -> View:
        if link[0] is aten.detach.default:
            storage = Storage(
                self.detached(self.current(base.storage)), memory=base.storage.memory
            )
            return View(storage, base.chain)
        return View(base.storage, (*base.chain, link))

    def seen(
        self, base: View, op: OpOverload, args: tuple, kwargs: dict, index: int | None, sig: Sig
    ) -> View:
        """A tensor seen through a view op, or one that became what the op shows of it."""
        if op in (aten.as_strided.default, aten.resize.default):
            return View(base.storage, restrided(base.storage.sig, base.chain, sig))
        return self.through(base, linked(base.sig, op, args, kwargs, index, sig))

    def shown(self, ref: int) -> Node:
        """As :meth:`read`, always as a view of the memory it shares: also where it was itself
        written last."""
        view = self.env[ref]
        if view.__class__ is View and view.chain and view.storage.memory.version:
            view.version = -1
        return self.read(ref)

    def memory(self, ref: int) -> Node:
        """The current value of all the memory that a value was made with (what is computed has its
        own)."""
        view = self.env[ref]
        node = view
        if view.__class__ is View:
            node, ops = self.current(view.storage), [link[0] for link in view.chain]
            for link in view.chain[
                : max((i + 1 for i, op in enumerate(ops) if op in COMPUTED), default=0)
            ]:
                node = forward(self.b, link, node)
        return self.cut_off(ref, node)

    def detached(self, node: Node, how: OpOverload = aten.detach.default) -> Node:
        if (node, how) not in self.cuts:
            self.cuts[node, how] = self.b.node(how, (node,), {}, node.meta["val"])
        return self.cuts[node, how]

    def bind(self, node: Node, grad: bool, how: OpOverload = aten.detach.default) -> int:
        """Give the next result of the recording its value."""
        ref = self.number
        self.number += 1
        cut = not grad and node.meta["val"].differentiable
        self.env[ref] = View(Storage(node, cut=cut)) if self.mutates else node
        if cut:
            self.cut[ref] = how
        return ref

    def how_cut(self, instr: Instr, refs: Sequence[int]) -> OpOverload:
        """How the results of an op under no_grad are read where gradients are on."""
        if instr.facts.view_of is None or instr.op is aten.detach.default:
            return aten.detach.default
        return self.cut.get(refs[0], dead_end)

    def alias(self, ref: int, base: int, links: Sequence[Link]) -> None:
        """Let a result share the memory of ``base``, seen through ``links``."""
        view, node = self.env[base], self.env[ref].node
        for link in links:
            view = self.through(view, link)
        self.env[ref] = View(view.storage, view.chain, node)
        self.env[ref].version = view.storage.memory.version

    def write(self, ref: int, new: Node, grad: bool = True, line: Line | None = None) -> None:
        """Replace the value of a tensor, and with it that of every tensor which shares its
        storage."""
        view = self.env[ref]
        target = view.sig
        if overlaps_itself(target):
            raise CaptureError(
                "a write to an expanded tensor: several of its elements share memory; clone() it "
                f"first{at(line)}"
            )
        new = self.fitted(new, target)
        storage = view.storage
        if grad and storage.cut:  # from here on it carries a derivative: that of what is written
            self.became(storage, self.detached(self.current(storage)))
            storage.cut = False
            self.cut = {
                r: how for r, how in self.cut.items() if self.env[r].storage is not storage
            }
        bases = [self.current(storage)]
        for link in view.chain[:-1]:
            bases.append(forward(self.b, link, bases[-1]))
        whole = new
        for link, base in zip(reversed(view.chain), reversed(bases), strict=False):
            whole = inverse(self.b, link, base, whole, line)
        whole = self.fitted(whole, storage.sig)
        if not grad and target.differentiable:
            whole = self.b.node(hidden_write, (storage.node, whole), {}, whole.meta["val"])
        self.became(storage, whole)
        if self.direct and (grad or not target.differentiable):
            view.node, view.version = new, storage.version

    def fitted(self, node: Node, sig: Sig) -> Node:
        """Cast and expanded as a write into a tensor of this signature does."""
        val: Sig = node.meta["val"]
        if val.dtype is not sig.dtype or val.device != sig.device:
            node = self.b.call(aten._to_copy.default, node, dtype=sig.dtype, device=sig.device)
        if val.shape != sig.shape:
            node = self.b.call(aten.expand.default, node, list(sig.shape))
        return laid_out(self.b, node, sig)  # the written tensor keeps its layout

    # ----- the walk ------------------------------------------------------------------------------

    def run(self) -> None:
        for i, (instr, refs, grad, region, line) in enumerate(self.trace.records):
            self.b.meta = {"line": line} if region is None else {"line": line, "region": region}
            if instr.__class__ is not Instr:
                instr.lower(self, refs, grad, line)
            elif instr.facts.writes:
                self._write(instr, refs, grad, line, i in self.trace.autograd.overwritten)
            elif self.mutates and instr.facts.view_of is not None:
                self._view(instr, refs, grad)
            else:
                nodes = self._nodes(instr, refs, grad)
                self._results(
                    self._call(instr, nodes), instr.outs, grad, self.how_cut(instr, refs)
                )
        self.b.meta = {}

    def _nodes(self, instr: Instr, refs: Sequence[int], grad: bool) -> list[Any]:
        """The values of an op's tensors, and of its number where that is no literal."""
        nodes: list[Any] = [self.read(r, grad) for r in refs]
        if instr.number is torch.float32 and literal(nodes) is None:
            i = instr.sigs.index(NUMBER)
            nodes[i] = self.b.call(aten._to_copy.default, nodes[i], dtype=instr.number)
        return nodes

    def _call(self, instr: Instr, nodes: list[Node]) -> Any:
        if not self.intent and instr.op is aten.detach.default:
            return nodes[0]
        if instr.op in COMPUTED:
            return forward(
                self.b,
                Link((instr.op, fill(instr.args, nodes)[1:], {}, None, instr.outs)),
                nodes[0],
            )
        if instr.number is not None and literal(nodes) is None:
            return self.b.node(*with_tensor(instr.op, fill(instr.args, nodes)), {}, instr.outs)
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
                if flat(o):
                    self._results(self.b.item(out, i), o, grad, how)

    def _view(self, instr: Instr, refs: tuple, grad: bool) -> None:
        """A view shares the storage of its argument, the first tensor; another says where it
        starts."""
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
            cut = (
                refs[0] in self.cut and instr.op is not aten.detach.default
            )  # which is a cut itself
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
        if (
            op is aten.copy_.default and not self.direct
        ):  # what is read of the copy is not read of its source
            news[0] = self.b.call(aten.clone.default, news[0])
        if self.intent and grad and op in TRUTH and nodes[0].meta["val"].differentiable:
            news[0] = self.truth(op, nodes, news[0])
        if overwritten:
            news[0] = self.still_requiring_grad(nodes[0], news[0])
        for ref, new in zip(written, news[-len(written) :], strict=True):
            self.write(ref, new, grad, line)
        # results that are not the written arguments themselves
        extra = news[: len(news) - len(written)] if len(news) > len(written) else []
        outs = instr.outs if isinstance(instr.outs, tuple) else (instr.outs,)
        fresh = [o for o, same in zip(outs, facts.same, strict=False) if same is None]
        for new, o in zip(extra, fresh, strict=False):
            self._results(self.fitted(new, o) if o.__class__ is Sig else new, o, grad)

    def truth(self, op: OpOverload, nodes: list[Node], new: Node) -> Node:
        """What an op that answers with truth values leaves in a tensor of numbers."""
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

    def still_requiring_grad(self, old: Node, new: Node) -> Node:
        """The new value of a tensor that requires grad, and does so still: the derivative of the
        old one is zero."""
        new = self.fitted(new, old.meta["val"])
        both = self.b.call(aten.add.Tensor, self.b.call(aten.zero.default, old), new)
        return self.b.node(hidden_write, (both, new), {}, new.meta["val"])

    def _twin_results(self, twin: OpOverload, instr: Instr, nodes: list[Node]) -> list:
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

    def mutated(self) -> list[tuple[int, Node]]:
        """Inputs and lifted tensors that were written: ``(placeholder index, final value)``."""
        if not self.mutates:
            return []
        found = []
        refs = [*range(len(self.trace.inputs)), *(-1 - i for i in range(len(self.trace.lifted)))]
        for index, ref in enumerate(refs):
            view = self.env[ref]
            storage = view.storage
            changed = storage.written or (
                storage.memory.version and storage.memory.first is storage
            )
            if changed and storage.ref == ref:
                node = self.current(storage)
                for link in storage.chain:
                    node = forward(self.b, link, node)
                found.append((index, node))
        return found


def input_nodes(trace: Trace, builder: Builder, names: Sequence[str] = ()) -> list[Node]:
    """A placeholder for each input and each lifted tensor of a recording."""
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


def literal(values: Sequence[Any]) -> float | None:
    """The number among an op's values; None where that is a node, too."""
    return next((v for v in values if v.__class__ is float or v.__class__ is int), None)


#: views that show the same tensor if their result has its signature
SAME_IF_EQUAL = (aten.slice.Tensor, aten.view.default, aten.alias.default)
