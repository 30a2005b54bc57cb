"""A program as text that can be taken apart: its statements, and how it becomes smaller."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .random_statements import HEADER, LIBRARY

FILE = "<random program>"


@dataclass
class Block:
    """A compound statement."""

    head: str
    body: list[Line] = field(default_factory=list)


Line = str | Block


def render(lines: list[Line], indent: str = "") -> str:
    """The text of the statements."""
    text = []
    for line in lines:
        head = line.head if isinstance(line, Block) else line
        text += [indent + part for part in head.split("\n")]
        if isinstance(line, Block):
            text.append(render(line.body or ["pass"], indent + "    "))
    return "\n".join(text)


def source(lines: list[Line]) -> str:
    """The text of a program with what it imports and uses."""
    text = render(lines)
    used = [definition for name, definition in LIBRARY.items() if re.search(rf"\b{name}\b", text)]
    return "\n\n".join([HEADER, *used, text]) + "\n"


def program_of(lines: list[Line]) -> Callable:
    """The program as a function."""
    text = source(lines)
    linecache.cache[FILE] = (len(text), None, text.splitlines(True), FILE)
    env: dict = {"__name__": "program"}
    exec(compile(text, FILE, "exec"), env)
    return env["program"]


def without(lines: list[Line], number: int) -> list[Line]:
    """The program without the statement in this line of its source."""
    number -= source(lines).count("\n") - render(lines).count("\n") - 1

    def kept(lines: list[Line]) -> Iterator[Line]:
        nonlocal number
        for line in lines:
            size = render([line]).count("\n") + 1
            head = size if isinstance(line, str) else line.head.count("\n") + 1
            if 0 < number <= head:
                number -= size
            elif isinstance(line, str):
                number -= size
                yield line
            else:
                rest = number - size
                number -= head
                yield Block(line.head, list(kept(line.body)))
                number = rest

    return list(kept(lines))


def smaller(lines: list[Line]) -> Iterator[list[Line]]:
    """The program with one statement less, or with a compound statement opened, or a result
    less."""
    for i in reversed(range(len(lines))):
        line, before, after = lines[i], lines[:i], lines[i + 1 :]
        yield before + after
        if isinstance(line, Block):
            if not line.head.startswith(("def", "class", "@")):
                yield before + line.body + after
            for body in smaller(line.body):
                yield [*before, Block(line.head, body), *after]
        elif line.startswith("return ") and "," in line:
            results = line.removeprefix("return ").split(", ")
            for k, r in enumerate(results):
                if r != "None":
                    yield [
                        *before,
                        "return " + ", ".join([*results[:k], "None", *results[k + 1 :]]),
                        *after,
                    ]


def shrunk(lines: list[Line], fails: Callable[[list[Line]], bool]) -> list[Line]:
    """The program without the statements that it can do without and still fail."""
    while True:
        for fewer in smaller(lines):
            if fails(fewer):
                lines = fewer
                break
        else:
            return lines
