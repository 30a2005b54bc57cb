"""Random programs around a compiled function do what they do in eager mode, or are refused and
leave all as it was.

AOTFUNC_FUZZ=N runs N of them (AOTFUNC_FUZZ_FIRST: from which seed on; AOTFUNC_FUZZ_WAY: compiled
in which way); a program that differs is printed as a script, made minimal."""

from __future__ import annotations

import collections
import os
import re

import pytest

from tests.sweeps import seeds

from .differential import WAYS, differs, minimal, script, valid
from .program_text import program_of
from .random_programs import drawn

SEEDS = seeds(60)
WAY = os.environ.get("AOTFUNC_FUZZ_WAY")

#: kinds of statements that are switched off, and why
OFF: dict[str, str] = {}

REFUSED: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def refusals():
    """Say how often a program was refused, and why: a generator of refused programs tests
    nothing."""
    yield
    print(*(f"refused {n} times: {message}" for message, n in REFUSED.most_common()), sep="\n")
    assert sum(REFUSED.values()) <= 0.1 * 2 * len(SEEDS) + 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program(seed):
    checked = valid(drawn(seed, OFF.keys()))
    assert checked is not None, "eager mode refuses the program"
    lines, want = checked
    for way in [WAY] if WAY else ["jit", "min cut" if seed % 2 else "default partition"]:
        why, refusal = differs(program_of(lines), way, want)
        assert why is None, f"{way}: {why}\n\n{script(minimal(lines, way, why), way)}"
        if refusal is not None:
            REFUSED[re.sub(r"\(at .*?\)|\d+", "", refusal)] += 1


def test_a_program_that_differs_becomes_a_short_script(monkeypatch):
    """The fuzzer finds a compiler's fault, here one that forgets a factor, and keeps what shows
    it."""
    monkeypatch.setitem(
        WAYS, "faulty", lambda f: lambda *args, **kwargs: f(*[a * 1.5 for a in args], **kwargs)
    )
    for seed in range(20):
        lines, want = valid(drawn(seed, OFF.keys()))
        why, _ = differs(program_of(lines), "faulty", want)
        if why is not None and "value" in why:
            break
    text = script(minimal(lines, "faulty", why), "faulty")
    scope: dict = {}
    exec(text, scope)
    assert differs(scope["program"], "faulty")[0] and len(text.splitlines()) < 45
