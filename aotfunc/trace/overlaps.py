"""Refuse ops in place that meet memory which they write through another view, too, where the
result depends on the order in which their kernel goes through it (``x.add_(x[0])``).

A graph reads everything before it writes. PyTorch refuses most such views; for the others both
ways are tried once, on scratch memory in which they lie as the arguments do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache import Cache
from ..debug import at, user_line
from ..errors import CaptureError, OpError
from .memory import Span, extent, meeting_pairs, memory_at, memory_of, overlap
from .records import written_slots
from .scalars import NUMBER
from .shapes.instr import Instr
from .shapes.sig import Sig, fill
from .traced import quiet

if TYPE_CHECKING:
    from .tracer import Trace

aten = torch.ops.aten


#: (instruction, places), or (instruction, which arguments share memory made in the recording) ->
#: one of these, or PyTorch's words where it refuses them
_verdicts = Cache(4096)
SAME, OTHER = "as a graph does", "in an order of its own"


def check_overlaps(trace: Trace) -> None:
    """Refuse the op in place that was recorded last if it meets memory that it writes through two
    views, and its kernel does something else then than a graph does."""
    instr, refs, *_ = trace.records[-1]
    if len(refs) == 1 or assigns_to_a_part(instr):
        return
    of, count = trace.roots().of, len(trace.inputs)
    roots = [of.get(r, r) for r in refs]
    if made_apart(roots, count):
        return
    if min(roots) < count:
        return check_places(trace)
    # of values made in this recording the signatures say where they lie
    pattern = (instr, *map(roots.index, roots))
    if _verdicts[pattern] is not SAME:
        check_places(trace)
        _verdicts.put(pattern, SAME)


def check_places(trace: Trace) -> None:
    """Refuse that op by where its arguments lie in memory."""
    instr, refs, *_ = trace.records[-1]
    written = written_slots(instr)
    places = {
        i: memory_at(trace, refs[i], sig) for i, sig in enumerate(instr.sigs) if sig is not NUMBER
    }
    slots = [*places]
    found = meeting_pairs([*places.values()], [extent(instr.sigs[i].proto) for i in slots])
    both = ((slots[a], slots[b]) for a, b in found)
    pairs = ((w, i) for pair in both for w, i in (pair, pair[::-1]) if w in written)
    met = next((pair for pair in pairs if meet(instr, places, *pair)), None)
    if met is None:
        return
    places = numbered_spans(instr, places)
    key = (instr, tuple(places.items()))
    verdict = _verdicts.once(key, lambda: observed_access(instr, places, written))
    if verdict is SAME:
        return
    line, (to, read) = at(user_line(3)), (list(instr.sigs[i].shape) for i in met)
    if verdict is not OTHER:
        raise OpError(f"{instr.op}({', '.join(map(str, instr.sigs))}): {verdict}{line}")
    raise CaptureError(
        f"{instr.op} writes to a tensor of shape {to} and meets its memory in another argument, "
        f"of shape {read}, too: the result depends on the order in which PyTorch's kernel goes "
        f"through it{line}; give it a clone() of what it reads"
    )


def assigns_to_a_part(instr: Instr) -> bool:
    """Return whether this stands for ``x[i] = value`` with numbers ``i`` in tensors: eager copies
    the value to a view of ``x`` then, and not by the op."""
    if instr.op is not aten.index_put_.default:
        return False
    return not any(s.ndim or s.dtype in (torch.bool, torch.uint8) for s in instr.sigs[1:-1])


def made_apart(roots: Sequence[int], count: int) -> bool:
    """Return whether values share no memory for the plain reason that all but one were made in
    this recording, which has ``count`` inputs, each with memory of its own."""
    made = [r for r in roots if r >= count]
    return len(made) >= len(roots) - 1 and len({*made}) == len(made)


def crossing_writes(elements: Sequence[Sequence[Tensor]], shared: Sequence[Tensor]) -> bool:
    """Return whether an op on lists, one element after the other, writes to the first tensor of an
    element what another one, or all, show."""
    every = [(k, i == 0, t) for k, one in enumerate(elements) for i, t in enumerate(one)]
    every += [(-1, False, t) for t in shared]
    places = [memory_of(t) for *_, t in every]
    for a, b in meeting_pairs(places, [extent(t) for *_, t in every]):
        (k, writes, s), (other, written, t) = every[a], every[b]
        if k != other and (writes or written):
            if overlap(s, places[a].start, t, places[b].start):
                return True
    return False


def meet(instr: Instr, places: Mapping[int, Span], w: int, i: int) -> bool:
    """Return whether a written tensor shares an element with another argument; a pointwise op may
    read at each place what it writes there."""
    to, other = instr.sigs[w], instr.sigs[i]
    at_each_place = torch.Tag.pointwise in instr.op.tags or instr.op is aten.bernoulli_.Tensor
    if at_each_place and places[w] == places[i] and to.start is other.start:
        return False
    return overlap(to.proto, places[w].start, other.proto, places[i].start)


def numbered_spans(instr: Instr, places: Mapping[int, Span]) -> dict[int, Span]:
    """Return the places in numbered pieces of memory, each of which begins in front of the first
    argument in it."""
    found: dict[int, Span] = {}
    memories = [*dict.fromkeys(p.memory for p in places.values())]
    number, memory, first, end = -1, -1, 0, 0
    for now, start, i in sorted((memories.index(p.memory), p.start, i) for i, p in places.items()):
        if now != memory or start >= end:
            number, memory, first, end = number + 1, now, start // 16 * 16, start
        found[i] = Span(number, start - first)
        end = max(end, start + extent(instr.sigs[i].proto))
    return {i: found[i] for i in places}


def observed_access(instr: Instr, places: Mapping[int, Span], written: Sequence[int]) -> str:
    """Return how the op's kernel goes through memory, or what PyTorch says that refuses it. Ops of
    others are not run, nor those that draw, nor on elements that begin amid others."""
    uneven = any(p.start % instr.sigs[i].dtype.itemsize for i, p in places.items())
    if instr.op.namespace != "aten" or instr.facts.random or uneven:
        return OTHER

    def view(whole: Tensor, i: int) -> Tensor:
        sig, start = instr.sigs[i], places[i].start
        whole = whole.view(sig.dtype)
        return whole.as_strided(sig.shape, sig.stride, start // sig.dtype.itemsize)

    def run(tensors: Sequence[Any]) -> Sequence[Any]:
        kwargs = {k: fill(v, tensors) for k, v in instr.kwargs.items()}
        instr.op(*fill(instr.args, tensors), **kwargs)
        return tensors

    def all_of(memory: Callable[[int], Tensor]) -> list[Any]:
        slots = range(len(instr.sigs))
        return [view(memory(places[i].memory), i) if i in places else 0.5 for i in slots]

    with quiet(), torch.no_grad():
        graph = {
            n: sample_bytes(instr, places, written, n) for n in {p.memory for p in places.values()}
        }
        kernel = {n: whole.clone() for n, whole in graph.items()}
        try:
            run(all_of(lambda n: kernel[n]))
            alone = run(all_of(lambda n: graph[n].clone()))
            for i in written:
                view(graph[places[i].memory], i).copy_(alone[i])
        except Exception as e:
            return str(e) if "single memory location" in str(e) else OTHER
        return SAME if all(torch.equal(graph[n], kernel[n]) for n in graph) else OTHER


def sample_bytes(
    instr: Instr, places: Mapping[int, Span], written: Sequence[int], n: int
) -> Tensor:
    """Return the bytes of a memory: small numbers, zeros for what may be indices."""
    here = [i for i, p in places.items() if p.memory == n]
    sig: Sig = instr.sigs[here[0]]
    end = max(places[i].start + extent(instr.sigs[i].proto) for i in here)
    low, high = (0, 2) if sig.dtype is torch.bool else (1, 8)
    if here[0] not in written and not (sig.differentiable or sig.dtype is torch.bool):
        low, high = 0, 1
    draw, count = torch.Generator().manual_seed(0), (end // 16 + 1) * 16 // sig.dtype.itemsize
    numbers = torch.randint(low, high, (count,), generator=draw)
    return numbers.to(sig.device, sig.dtype).view(torch.uint8)
