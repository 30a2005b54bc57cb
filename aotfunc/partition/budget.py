"""Read what users say as ``memory_budget``: how much a partition may take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{u}i": 1024**k for k, u in enumerate(("", "k", "m", "g", "t")) if u}


@dataclass(frozen=True)
class Bytes:
    """At most so many bytes saved, beyond the inputs: a number, or a text such as "512MiB"."""

    size: int | str

    @property
    def limit(self) -> int:
        return as_bytes(self.size)


@dataclass(frozen=True)
class Peak(Bytes):
    """At most so many bytes alive at one time in the forward and in the backward, as simulated:
    what they make and what is saved, without inputs and cotangents.

    >>> Peak("6GiB").limit
    6442450944
    """


@dataclass(frozen=True)
class Time:
    """Recomputation that takes at most this share of the forward's time; then as few bytes as
    possible.

    >>> Time(0.1)
    Time(share=0.1)
    """

    share: float

    def __post_init__(self) -> None:
        if not self.share >= 0:
            raise ArgumentError(f"Time({self.share}): a share of the forward's time is 0 or more")


@dataclass(frozen=True)
class Share:
    """A share of the way from the least bytes worth having (0) to nothing computed twice (1)."""

    share: float


Budget = Bytes | Peak | Time | Share


def as_budget(given: Any) -> Budget:
    """Return what a ``memory_budget`` means. Raises ArgumentError for what is none."""
    match given:
        case Bytes() | Peak() | Time():
            return given
        case bool():
            pass
        case 0 | 1:
            return Share(float(given))
        case int() | str():
            return Bytes(as_bytes(given))
        case float() if 0 <= given <= 1:
            return Share(given)
    raise ArgumentError(
        f"memory_budget is {given!r}; it is a share from 0.0 to 1.0, a number of bytes, a text "
        'such as "512MiB", Peak("6GiB") or Time(0.1)'
    )


def as_bytes(size: int | str) -> int:
    """Return a number of bytes, also that of a text such as "512MiB" or "6 GB".

    >>> as_bytes("1.5kB"), as_bytes("2MiB")
    (1500, 2097152)
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?i?)b?\s*", size, re.IGNORECASE)
        if found is None or found[2].lower() not in _UNITS:
            raise ArgumentError(f'{size!r} is no size; "512MiB", "6 GB" or "1000" are')
        return int(float(found[1]) * _UNITS[found[2].lower()])
    if size < 0:
        raise ArgumentError(f"a budget of {size} bytes is less than nothing")
    return size
