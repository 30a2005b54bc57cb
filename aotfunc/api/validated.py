"""Give a transform the option ``validate``: its first call is compared (see :mod:`.validate`)."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch.compiler import is_dynamo_compiling

from ..errors import ArgumentError
from ..trace.traced import current


def compared_inside(f: Callable) -> Callable:
    """Return a function of :func:`validated` as one whose first call is compared."""
    owner, make = getattr(f, "_compared", (0, lambda: f))
    return make() if owner == id(f) else f  # others have the attribute of what they wrap


def check_outermost(name: str) -> None:
    """Raise ArgumentError inside of a transform, where there are no values to compare."""
    if current() is not None:
        raise ArgumentError(
            f"{name}(validate=True) is called inside another transform, where there are no values "
            "to compare; give validate to the outermost one"
        )


class Nested(threading.local):
    """The transforms that an eager run of a function has met, each with its function: those inside
    of a validated one are validated, too, once. None: they are not."""

    seen: set[tuple[int, int]] | None = None

    def is_new(self, transform: Callable, f: Callable) -> bool:
        """Return whether this is the first call of the transform on the code of ``f``."""
        if self.seen is None:
            return False
        key, before = (id(transform), id(getattr(f, "__code__", f))), len(self.seen)
        self.seen.add(key)
        return len(self.seen) > before

    @contextlib.contextmanager
    def kept(self, seen: set | None) -> Iterator[None]:
        outer, self.seen = self.seen, seen
        try:
            yield
        finally:
            self.seen = outer


NESTED = Nested()


def validated(kind: Any) -> Callable:
    """Make a decorator that adds the option ``validate``: the first call is compared."""

    def decorate(transform: Callable) -> Callable:
        own = inspect.signature(transform)

        def checked(args: tuple, options: dict, inner: bool) -> Any:
            bound = own.bind(*args, **options)
            bound.apply_defaults()
            f = next(iter(bound.arguments.values()))
            if f is None:  # a decorator with options
                return functools.partial(make, validate=not inner, **options)
            if inner and not NESTED.is_new(transform, f):
                return transform(*args, **options)
            check = kind(transform, f, bound.arguments)
            check.inner = inner
            return check.first(*bound.args, **bound.kwargs)

        @functools.wraps(transform)
        def make(*args: Any, validate: bool = False, **options: Any) -> Any:
            if validate:
                return checked(args, options, inner=False)
            if not kind.nests or is_dynamo_compiling():
                return transform(*args, **options)
            if NESTED.seen is not None and current() is None:
                return checked(args, options, inner=True)
            made = transform(*args, **options)
            if made.__class__ is types.FunctionType:
                again = functools.partial(checked, args, options, inner=True)
                setattr(made, "_compared", (id(made), again))  # noqa: B010
            return made

        listed = [*own.parameters.values()]
        option = inspect.Parameter("validate", inspect.Parameter.KEYWORD_ONLY, default=False)
        listed.insert(len(listed) - (listed[-1].kind is inspect.Parameter.VAR_KEYWORD), option)
        make.__signature__ = own.replace(parameters=listed)  # type: ignore[attr-defined]
        return make

    return decorate
