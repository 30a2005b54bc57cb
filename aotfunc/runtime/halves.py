"""The two halves of a compiled call, for the gradients of some of its inputs: their programs,
which results and inputs belong together, and smaller backwards for fewer cotangents."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..capture.calls import CompiledCall, hidden_writes
from ..capture.custom_derivative import CustomDerivative
from ..capture.makers import FUNCTION
from ..graph import Program, needed_for
from ..trace.emit import Builder, paused_gc
from ..trace.shapes.sig import Sig
from ..trace.views import laid_out
from ..transforms.activity import active_nodes, flat_inputs, live, sources
from ..transforms.tidy import rebuilt
from ..transforms.vjp import contiguous_sig, vjp
from ..transforms.walk import builder
from .chain_steps import cut_stages
from .late_reads import late_reads
from .late_state import reads_state
from .lifted import ResultGroups, result_groups
from .meetings import as_known, bent_nodes, kept_results, meetings, parted, without_meetings
from .unsaved import apart_from_results
from .unseen import unseen_in_flow
from .usual import usual_backward

aten = torch.ops.aten
#: nodes of autograd for one call, each with a backward graph of its own
MANY = 32


class Halves:
    """The halves for the gradients of the inputs ``wrt``, and perhaps a gradient program."""

    def __init__(self, call: CompiledCall, wrt: tuple[int, ...]) -> None:
        self.call, self.wrt = call, wrt
        program = call.program
        self.program = without_meetings(program.flat())
        self.count = self.program.n_outputs
        #: whether each result has a derivative: the others do not require grad, as in eager; nor
        #: does what writes hidden from autograd leave
        quiet = [*[False] * program.n_outputs, *hidden_writes(program)]
        found = live(self.program, wrt)
        self.live = [yes and not no for yes, no in zip(found, quiet, strict=True)]
        self.any_live = any(self.live)
        #: further results, at which cotangents of second derivatives meet
        self.met = meetings(self.program, wrt, self.live)
        #: results that second derivatives read, too, behind the hooks that the caller registers:
        self.keeping = kept_results(self.program, wrt, self.live, self.met, call.made)
        self.unseen = unseen_in_flow(self.program, self.live)
        #: whether a body's derivative is not linear
        self.bent = bool(bent_nodes(self.program, bodies=True))
        self.needed: tuple[int, ...] = ()
        self.unreached: tuple[int, ...] = ()
        self.masks = masks(self.program, wrt, self.live)
        #: for each result, the inputs by which its derivative is zero, unless the program has one
        self.flat = flat_inputs(self.program, wrt)
        #: inputs of some results and not of others
        self.differing = [
            i for i in wrt if len({mask >> i & 1 for mask in self.masks.values()}) > 1
        ]
        self.vals = self.program.vals
        self.materializes = materializes(self.program)
        reads = late_reads(program)
        self.late_reads = reads if any(reads) else None
        self.reads_state = reads_state(program)
        self._backwards: dict[tuple, Any] = {}
        if not self.any_live:
            return
        joint, self.early = self.joint(), self.count + len(self.met)
        grads = joint.outputs[self.early : self.early + len(wrt)]
        zeros = set().union(*self.flat)
        self.unreached = tuple(
            i for i, g in zip(wrt, grads, strict=True) if g is None and i not in zeros
        )
        self.needed = tuple(
            inputs_read(joint, joint.outputs[self.early :], len(program.placeholders))
        )
        cut = call.split(joint, self.early, last=True)
        self.forward, self.backward = apart_from_results(call, self.program, wrt, cut, self.early)
        self.saved: Sequence[int] = range(
            len(self.backward.program.placeholders) - sum(map(bool, self.live))
        )
        #: the results and inputs of the only node, where there is one and it reaches all inputs
        self.whole = [i for i, yes in enumerate(self.live) if yes], [*wrt]
        self.usual = usual_backward(self)

    def joint(self) -> Program:
        """Return the program of the results and the gradients, before it is cut."""
        whole = as_known(self.program, self.met) if self.met else self.program
        live = [*self.live, *[False] * len(self.met)]
        return vjp(whole, self.wrt, live, recompute=False)

    def programs(self) -> dict[str, Program]:
        """Return the joint program and its halves by name; none if no result has a derivative."""
        if not self.any_live:
            return {}
        forward, backward = self.forward.program, self.backward.program
        return {"joint": self.joint(), "forward": forward, "backward": backward}

    def parts(self, tensors: Sequence[Tensor]) -> list[tuple[list[int], list[int]]]:
        """Return the live results and their inputs, ``(results, inputs)`` of each node."""
        apart = tuple(
            [i for i in self.differing if not tensors[i].is_leaf or tensors[i]._backward_hooks]
        )
        return self.program.once(
            ("parts", self.wrt, apart), lambda: parts(self.masks, self.wrt, apart)
        )

    def lifts(self, outs: Sequence[int]) -> ResultGroups:
        """Return which of the results ``outs`` of one node go behind nodes in common."""
        key = ("lifts", self.wrt, *outs)
        return self.program.once(key, lambda: result_groups(outs, self.keeping))

    def reached(self, tensors: Sequence[Tensor], inputs: Sequence[int]) -> list[Tensor]:
        """Return these inputs, with no way back to those that have no gradient: their hooks would
        run, and their graph be freed. The results require grad because of them too."""
        return [
            tensors[i].detach().requires_grad_() if i in self.unreached else tensors[i]
            for i in inputs
        ]

    def backward_for(
        self, have: tuple[bool, ...], sigs: tuple[Sig, ...]
    ) -> tuple[CompiledCall, Sequence[int]]:
        """Return the backward half where only some results have a cotangent, and those lie as
        ``sigs`` say; which of the residuals it takes."""
        half, plain = self.backward, all([sig.plain for sig in sigs])
        if plain and all(have):
            return half, self.saved
        found = self._backwards.get((have, sigs))
        if found is None:
            reads, count = self.saved, len(self.saved)
            absent = [i for i, yes in enumerate(have) if not yes]
            program = half.program
            if absent:
                program = without_cotangents(program, len(have), absent)
                reads = inputs_read(program, program.outputs, count)
                program = only_inputs(program, reads, count)
            if not plain:
                program = with_cotangents_laid(program, sigs)
            half = CompiledCall(program, half.compile, half.split, half.__name__)
            found = self._backwards[have, sigs] = half, reads
        return found

    def residuals_of(self, outs: Sequence[int]) -> Sequence[int]:
        """Return which of the residuals the gradients of these results read."""
        have = tuple([i in outs for i, yes in enumerate(self.live) if yes])
        return self.backward_for(have, tuple([contiguous_sig(self.vals[i]) for i in outs]))[1]

    def apart(self, done: frozenset[int], outs: frozenset[int]) -> bool:
        """Return whether the gradients of ``outs`` read nothing that those of other results have
        read, but for inputs: autograd has graphs of their own then."""

        def find() -> bool:
            common = set(self.residuals_of(sorted(done)))
            common.intersection_update(self.residuals_of(sorted(outs)))
            saved = self.forward.program.outputs[self.early :]
            return all(isinstance(r := saved[i], Node) and r.op == "placeholder" for i in common)

        if done & outs:
            return False
        return self.program.once(("apart", self.wrt, done, outs), find)

    def zero(self, i: int, outs: set[int]) -> Tensor | None:
        """Return the gradient of an input without one in the program, by ``outs``."""
        if not any(i in self.flat[k] for k in outs):
            return None
        sig = self.program.placeholders[i].meta["val"]
        return torch.zeros(sig.shape, dtype=sig.dtype, device=sig.device)

    def met_by(self, outs: Sequence[int]) -> tuple[int, ...] | None:
        """Return which of ``met`` the results ``outs`` are computed from; None if results of other
        nodes are computed by the same Functions."""

        def find() -> tuple[int, ...] | None:
            if self.shared(outs):
                return None
            calls = [n for n in self.program.graph.nodes if n.op == "call_function"]
            mine = needed_for(calls, [self.program.outputs[k] for k in outs])
            return tuple([i for i, n in enumerate(self.met) if n in mine])

        if not self.met:
            return ()
        return self.program.once(("met by", self.wrt, tuple(outs)), find)

    def met_at(self, k: int) -> int | None:
        """Return the number of the further result that result ``k`` is."""
        at = [self.count + i for i, n in enumerate(self.met) if n is self.keeping[k].value]
        return at[0] if at else None

    def kept_for(self, outs: frozenset[int]) -> frozenset[int]:
        """Return which of the results ``keeping`` may be read by the gradients of ``outs``."""

        def find() -> frozenset[int]:
            calls = [n for n in self.program.graph.nodes if n.op == "call_function"]
            mine = needed_for(calls, [self.program.outputs[k] for k in outs])
            return frozenset([k for k, kept in self.keeping.items() if kept.group[0] in mine])

        return self.program.once(("kept for", self.wrt, outs), find)

    def shared(self, outs: Sequence[int]) -> list[Any]:
        """Return the Functions of ``met`` that compute both ``outs`` and other live results."""

        def find() -> list[Any]:
            calls = [n for n in self.program.graph.nodes if n.op == "call_function"]
            mine, others = set[Any](), set[Any]()
            for k, (o, yes) in enumerate(zip(self.program.outputs, self.live, strict=True)):
                if yes:
                    (mine if k in outs else others).update(needed_for(calls, [o]))
            return [n for n in {u.args[0] for u in self.met} if n in mine and n in others]

        if not self.met:
            return []
        return self.program.once(("shared", self.wrt, tuple(outs)), find)

    def stages(self, shared: frozenset[Node]) -> list[tuple[CompiledCall, list, list]]:
        """Return the call cut behind these Functions, for autograd to add the cotangents of their
        results: ``(call, what it reads, results)`` of each stage, none where it cannot be cut.
        Identities in front of a module stay with the one behind it."""

        def find() -> list[tuple[CompiledCall, list, list]]:
            last = {getattr(n.target, "link", n): n for n in self.program.graph.nodes}.values()
            cuts = [u for u in self.met if u.args[0] in shared and u.args[0] in last]
            old, made = self.call, dict(zip(self.program.outputs, self.call.made, strict=False))
            found = []
            for program, reads, outs in cut_stages(self.program, cuts):
                call = CompiledCall(program, old.compile, old.split, old.__name__)
                call.made = [made.get(n, FUNCTION) for n in outs]
                found.append((call, reads, outs))
            return found

        return self.program.once(("stages", self.wrt, shared), find)

    def gradient(
        self,
        have: tuple[bool, ...],
        sigs: tuple[Sig, ...],
        met: tuple[int, ...] = (),
        known: tuple[int, ...] = (),
    ) -> CompiledCall:
        """Return ``(needed inputs, known, cotangents) -> gradients`` as one compiled call. The
        further results ``met`` have the last cotangents; ``known`` ones are inputs."""

        def make() -> Program:
            lives, given = iter(have), iter(sigs)
            cts = [yes and next(lives) for yes in self.live]
            whole = self.program
            if met or known:
                cts += [i in met for i in range(len(self.met))]
                whole = as_known(whole, self.met, known, self.keeping)
            plan = [next(given) if yes else None for yes in cts]
            joint = vjp(whole, self.wrt, cts, keep=(), plan=plan)
            joint = parted(joint) if known else joint
            return only_inputs(joint, self.needed, len(self.program.placeholders))

        return self.call.derived(("gradient", self.wrt, have, sigs, met, known), make, "gradient")


# ----- what a program's results have in common ---------------------------------------------------


def masks(program: Program, wrt: Sequence[int], live: Sequence[bool]) -> dict[int, int]:
    """Return, as bits, the inputs ``wrt`` that each live result has a derivative of."""
    inputs = program.placeholders
    found = {inputs[i]: 1 << i for i in wrt}
    for n in active_nodes(program.graph.nodes, list(found), zeros=True):
        for i in sources(n) if n.op == "call_function" else ():
            found[n] = found.get(n, 0) | found.get(i, 0)
    return {
        k: found[o] for k, (o, yes) in enumerate(zip(program.outputs, live, strict=True)) if yes
    }


def parts(
    masks: dict[int, int], wrt: Sequence[int], apart: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Return the results and their inputs in groups that no derivative connects. Of the inputs
    ``apart``, which have hooks or a graph of their own, all results of a group depend, or none:
    autograd would go there for any. Where there would be more than MANY groups there are fewer."""
    strict = sum(1 << i for i in apart)
    groups: dict[int, list[int]] = {}
    for k, mask in masks.items():
        outs = [k]
        for other in [m for m in groups if m & mask and not (m ^ mask) & strict]:
            mask, outs = mask | other, [*groups.pop(other), *outs]
        groups[mask] = outs
    if len(groups) > MANY:
        return parts(masks, wrt, ()) if apart else [(list(masks), list(wrt))]
    return [(sorted(outs), [i for i in wrt if mask >> i & 1]) for mask, outs in groups.items()]


def materializes(program: Program) -> bool:
    """Return whether a Function of several outputs gets zeros for absent cotangents."""

    def one(n: Node) -> bool:
        if isinstance(n.target, CustomDerivative):
            return None in n.target.backward and n.target.n_outputs > 1
        return isinstance(n.target, CompiledCall) and materializes(n.target.program)

    return program.once("materializes", lambda: any(map(one, program.graph.nodes)))


# ----- smaller programs --------------------------------------------------------------------------


def inputs_read(program: Program, outs: Sequence[Any], count: int) -> list[int]:
    """Return which of the first ``count`` inputs ``outs``, draws or effects depend on."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    found = needed_for(calls, outs)
    return [i for i, p in enumerate(program.placeholders[:count]) if p in found]


def only_inputs(program: Program, needed: Sequence[int], count: int) -> Program:
    """Return the program without those of its first ``count`` inputs that nothing depends on."""
    unused = [p for i, p in enumerate(program.placeholders[:count]) if i not in needed]
    return rebuilt(program, "only_inputs", env=dict.fromkeys(unused))


def without_cotangents(program: Program, count: int, absent: Sequence[int]) -> Program:
    """Return a backward half without those of its ``count`` cotangents, the last inputs, that do
    not arrive.

    What depends on absent cotangents alone is dropped (feeding zeros would give 0 * inf = nan); a
    gradient without terms is None."""
    placeholders = program.placeholders
    cotangents = placeholders[len(placeholders) - count :]
    missing = {cotangents[i] for i in absent}
    linear = set(cotangents)  # depends on cotangents

    def visit(b: Builder, n: Node, env: dict[Node, Any]) -> Any:
        read = [i for i in n._input_nodes if i in linear]
        absent = [i for i in read if i in missing]
        if read:
            linear.add(n)
        if not absent:
            return NotImplemented
        if absent == read:
            missing.add(n)
            return None
        return b.call_like(n, ChainMap({i: zero_cotangent(b, i) for i in absent}, env))

    return rebuilt(program, "backward", visit, env=dict.fromkeys(missing))


def with_cotangents_laid(program: Program, sigs: Sequence[Sig]) -> Program:
    """Return a backward half whose cotangents, the last inputs, lie as these signatures say."""
    old = program.placeholders
    vals = [*[p.meta["val"] for p in old[: len(old) - len(sigs)]], *sigs]
    with paused_gc():
        b = builder()
        new = [
            b.placeholder(p.name, v, role=p.meta.get("role"))
            for p, v in zip(old, vals, strict=True)
        ]
        outs = b.inlined(program, new)
        return Program(b.finish(outs), program.n_inputs, program.n_outputs, (), program.name)


def zero_cotangent(b: Any, n: Node) -> Any:
    val = n.meta["val"]
    kwargs = {"dtype": val.dtype, "device": val.device}
    return laid_out(
        b,
        b.make(
            "call_function", aten.zeros.default, (list(val.shape),), kwargs, contiguous_sig(val)
        ),
        val,
    )
