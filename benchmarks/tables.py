"""The tables of a page, and the numbers in their cells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

#: what one of each is, in seconds, bytes, or as it is
UNITS = {"": 1.0, "x": 1.0, "%": 0.01, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
UNITS |= {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "MB": 1e6}
NUMBER = re.compile(r"\**(\d+(?:\.\d+)?(?:e[+-]?\d+)?) ?(µs|ms|s|B|KiB|MiB|GiB|MB|x|%)?(?![\w.])")


class Table(NamedTuple):
    """A table under the heading ``caption``; each row begins with its name."""

    caption: str
    head: list[str]
    rows: list[list[str]]

    def columns(self, names: str) -> list[str]:
        """Return the columns whose whole name matches the expression."""
        return [c for c in self.head if re.fullmatch(names, c)]

    def values(self, column: str) -> dict[str, float]:
        """Return the numbers of a column by the rows' names; no number, no entry.

        >>> table = Table("", ["f", "ours"], [["sin", "12 µs (0.5x)"], ["cos", "wrong"]])
        >>> table.values("ours")
        {'sin': 1.2e-05}
        """
        at = self.head.index(column)
        return {row[0]: v for row in self.rows if (v := value(row[at])) is not None}


def value(cell: str) -> float | None:
    """Return the first number of a cell, in seconds, bytes, or as it is."""
    found = NUMBER.match(cell.replace("ᵃ", "").replace("ʰ", ""))
    return float(found[1]) * UNITS[found[2] or ""] if found else None


def tables(text: str, named: int = 1) -> Iterator[Table]:
    """Yield the tables of a page; its rows' names are their first ``named`` cells, of which the
    first stands for the rows below it, too, where these are empty."""
    for part in re.split(r"(?m)^#+ ", text)[1:]:
        lines = re.findall(r"(?m)^\|(.*)\|$", part)
        head, _, *rows = [[c.strip() for c in line.split("|")] for line in lines or ["", ""]]
        if len(head) > named:
            first = ""
            for row in rows:
                first = row[0] = row[0] or first
                row[:named] = [", ".join(row[:named])]
            yield Table(part.partition("\n")[0], head[named - 1 :], rows)
