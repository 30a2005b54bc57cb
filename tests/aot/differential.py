"""Does a program do the same compiled as in eager mode? Both are run and looked at; what differs
is made minimal."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aotfunc import aot_function, aot_module, jit, min_cut_rematerialization_partition
from aotfunc.api.jit import CompiledModule
from aotfunc.errors import AotfuncError

from .program_text import Line, program_of, shrunk, source, without
from .random_programs import is_leaf, plain


def of_module(f: Callable, way: Callable) -> Callable:
    """Modules by ``aot_module``, functions by ``way``."""
    return aot_module(f, "eager") if isinstance(f, nn.Module) else way(f)


#: how a function is compiled
WAYS: dict[str, Callable] = {
    "jit": jit,
    "default partition": lambda f: of_module(f, lambda f: aot_function(f, "eager")),
    "min cut": lambda f: aot_function(
        f, lambda gm, _: gm, partition_fn=min_cut_rematerialization_partition
    ),
    "inductor": lambda f: jit(f, backend="inductor"),
    "cpp": lambda f: jit(f, backend="cpp"),
}

#: how far values may lie apart: relative, and absolute; some of a program in float64 may be
# computed in float32
CLOSE = {torch.float64: 2e-6, torch.float32: 2e-3, torch.bfloat16: 5e-2}


# ----- looking -----------------------------------------------------------------------------------


@dataclass
class Look:
    """A tensor at one time."""

    value: Tensor
    stride: tuple
    offset: int
    requires_grad: bool
    is_leaf: bool | None
    grad: Tensor | None
    storage: int  # equal for tensors that share memory
    identity: int  # equal for names of one tensor
    written: bool  # since it was last looked at

    def differs(self, other: Look, derived: bool) -> str | None:
        """What is different in ``other``, which eager gives; of a ``derived`` tensor nobody
        promised the layout."""
        for what in ("shape", "dtype"):
            mine, theirs = getattr(self.value, what), getattr(other.value, what)
            if mine != theirs:
                return f"{what} {mine}, eager {theirs}"
        if why := far(self.value, other.value):
            return why
        plain = [] if derived else ["storage", "identity", "is_leaf"]
        for what in ["requires_grad", *plain]:
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs and theirs is not None:
                return f"{what} {mine}, eager {theirs}"
        if other.written and not (derived or self.written):
            return "its version says that it was not written to"
        counts = [i for i, n in enumerate(self.value.shape) if n > 1]
        if not derived and [self.stride[i] for i in counts] != [other.stride[i] for i in counts]:
            return f"strides {self.stride}, eager {other.stride}"
        if (self.grad is None) != (other.grad is None):
            return f".grad {self.grad}, eager {other.grad}"
        why = None if self.grad is None else far(self.grad, other.grad)
        return f".grad: {why}" if why else None


def far(a: Tensor, b: Tensor) -> str | None:
    """What keeps two tensors from being equal up to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{list(a.shape)}, eager {b.dtype}{list(b.shape)}"
    limit = CLOSE.get(torch.bfloat16 if all(map(rounded, (a, b))) else a.dtype, 0)
    if torch.allclose(a, b, rtol=limit, atol=limit, equal_nan=True):
        return None
    return f"value {a.tolist()}, eager {b.tolist()}"


def rounded(x: Tensor) -> bool:
    """Whether these are numbers of bfloat16, or sums of two such, whatever holds them now."""
    if not x.is_floating_point():
        return False
    digits = torch.frexp(x.float()).mantissa * 2**16
    short = (x == x.float()).all() and (digits == digits.round()).all()
    return bool(short) and not bool((x == x.round()).all())


Picture = dict[str, "Look | Tensor"]


class Eye:
    """``see()`` takes a picture of all tensors that the variables of its caller reach, and of the
    generator."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self.versions: dict[str, tuple[Tensor, int, Tensor, tuple]] = {}

    def __call__(self) -> None:
        self.pictures.append(self.look(sys._getframe(1)))

    def look(self, frame) -> Picture:
        picture: Picture = {"generator": torch.get_rng_state()}
        storages: dict[int, int] = {}
        identities: dict[int, int] = {}
        versions = {}
        for name, t in tensors({**frame.f_globals, **frame.f_locals}):
            storage = t.untyped_storage()._cdata
            known = self.versions.get(name)
            picture[name] = Look(
                t.detach().clone(),
                t.stride(),
                t.storage_offset(),
                t.requires_grad,
                leaf := is_leaf(t),
                t.grad.detach().clone() if leaf is True and t.grad is not None else None,
                storages.setdefault(storage, len(storages)),
                identities.setdefault(id(t), len(identities)),
                known is not None
                and known[0] is t
                and known[1] != t._version
                and changed(*known[2:], t),
            )
            versions[name] = (t, t._version, picture[name].value, t.stride())
        self.versions = versions
        return picture


def changed(before: Tensor, stride: tuple, now: Tensor) -> bool:
    return (
        before.shape == now.shape
        and stride == now.stride()
        and far(before, now.detach()) is not None
    )


def tensors(variables: dict) -> Iterator[tuple[str, Tensor]]:
    """``(expression, tensor)`` for what the variables hold."""
    for name, value in variables.items():
        if name.startswith("_"):
            continue
        if isinstance(value, nn.Module) and not isinstance(value, CompiledModule):
            for path, m in value.named_modules():
                for table in ("_parameters", "_buffers", ""):
                    for n, t in (m.__dict__.get(table, {}) if table else m.__dict__).items():
                        if isinstance(t, Tensor):
                            yield ".".join(part for part in (name, path, n) if part), t
        else:
            yield from inside(name, value)


def inside(name: str, value) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from inside(f"{name}[{i}]", v)
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from inside(f"{name}[{k!r}]", v)


def difference(got: Picture, want: Picture) -> str | None:
    if list(got) != list(want):
        return f"there are the tensors {sorted(set(got) ^ set(want))} on one side only"
    shared = Counter(look.storage for look in want.values() if isinstance(look, Look))
    for name, mine in got.items():
        theirs = want[name]
        if isinstance(mine, Look):
            why = mine.differs(theirs, name.startswith("grads"))
            if why is None and mine.offset != theirs.offset and shared[mine.storage] > 1:
                why = f"offset {mine.offset}, eager {theirs.offset}"
        else:
            why = None if torch.equal(mine, theirs) else "drew other numbers than eager"
        if why:
            return f"{name}: {why}"
    return None


# ----- running -----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What was seen, and how it ended: with an exception, and the picture at that time, or
    without."""

    pictures: list[Picture]
    error: Exception | None = None
    after: Picture | None = None
    lines: Sequence[int] = ()  # of the program, by which the exception came

    @property
    def refused(self) -> bool:
        """On purpose, or by autograd, to which a compiled call is one node that keeps what it
        likes."""
        told = (
            "has been modified by an inplace operation",
            "Trying to backward through the graph a second time",
        )
        told += (
            "A view was created in no_grad mode",
        )  # autograd does not say whether it is a leaf
        return isinstance(self.error, AotfuncError) or any(
            text in str(self.error) for text in told
        )


def run(program: Callable, compiled: Callable) -> Outcome:
    """The program, run with its functions wrapped in ``compiled``."""
    eye = Eye()
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program(compiled, eye)
        except Exception as e:
            file = program.__code__.co_filename
            frames = [
                (f, n)
                for f, n in traceback.walk_tb(e.__traceback__)
                if f.f_code.co_filename == file
            ]
            main = next(f for f, _ in frames if f.f_code is program.__code__)
            return Outcome(eye.pictures, e, eye.look(main), [n for _, n in frames])
        finally:
            torch.set_default_dtype(dtype)
            torch.set_rng_state(state)
    return Outcome(eye.pictures)


def differs(
    program: Callable, way: str, want: Outcome | None = None
) -> tuple[str | None, str | None]:
    """``(what differs from eager mode, with which message the program was refused)``; None where
    nothing was."""
    want = run(program, plain) if want is None else want
    if want.error is not None:
        return None, None
    got = run(program, WAYS[way])
    for k, (mine, theirs) in enumerate(zip(got.pictures, want.pictures)):
        if why := difference(mine, theirs):
            return f"see() number {k + 1}: {why}", None
    if got.refused:
        # autograd itself, which refuses a backward in the middle of it, has added to some .grad by
        # then
        ours = isinstance(got.error, AotfuncError)
        if ours and got.pictures and (why := difference(got.after, unwritten(got.pictures[-1]))):
            return (
                f"a refusal changed the state: {why.replace('eager', 'before')} ({got.error})",
                None,
            )
        return None, str(got.error)
    return (f"{type(got.error).__name__}: {got.error}" if got.error is not None else None), None


def unwritten(picture: Picture) -> Picture:
    """The picture that is due if nothing happens any more."""
    return {
        n: Look(**{**vars(x), "written": False}) if isinstance(x, Look) else x
        for n, x in picture.items()
    }


# ----- findings ----------------------------------------------------------------------------------


def valid(lines: list[Line]) -> tuple[list[Line], Outcome] | None:
    """The program, without the statements that eager mode refuses after all, and what it does
    there."""
    for _ in range(60):
        want = run(program_of(lines), plain)
        if want.error is None:
            return lines, want
        fewer = [without(lines, n) for n in reversed(want.lines)]
        lines = next((x for x in fewer if x != lines), lines)
    return None


def minimal(lines: list[Line], way: str, why: str) -> list[Line]:
    """The program without the statements that it can do without and still differ in this kind."""

    def fails(lines: list[Line]) -> bool:
        try:
            found = differs(program_of(lines), way)[0]
        except Exception:  # no program any more
            return False
        return found is not None and kind(found) == kind(why)

    return shrunk(lines, fails)


def kind(why: str) -> str:
    """The part of a difference that does not depend on names and numbers."""
    return re.sub(r"^see\(\) number \d+: \S+: |value.*|shape.*|strides.*|\d+|[\[{(].*", "", why)[
        :60
    ]


def script(lines: list[Line], way: str) -> str:
    """A minimal program, and what shows how it differs."""
    call = f"from tests.aot.differential import differs\n\nprint(differs(program, {way!r}))\n"
    return f"{source(lines)}\n\n{call}"
