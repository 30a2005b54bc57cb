"""The op matrix can tell: a wrong number from an error from a right one, and a crash or a hang
costs one cell."""

from types import SimpleNamespace

import pytest

import aotfunc
from tests.ops import report, table
from tests.ops.__main__ import Worker

ANSWERS = """
import json, os, sys, time
for line in sys.stdin:
    name = json.loads(line)[1]
    if name == "crash":
        os.kill(os.getpid(), 11)
    if name == "hang":
        time.sleep(60)
    print(json.dumps("right"), flush=True)
"""


def test_a_crash_and_a_hang_cost_one_cell_each():
    worker = Worker(("-c", ANSWERS), limit_s=3)
    outcomes = [
        worker.ask(("aotfunc", name, "float64", "vjp"))
        for name in ("sin", "crash", "sin", "hang", "sin")
    ]
    worker.stop()
    assert outcomes[::2] == ["right"] * 3
    assert outcomes[1] == "error: the process died (-11)"
    assert outcomes[3] == "error: no answer within 3 s"


def off_by_a_little(f):
    """A library whose derivatives are of another function, by one part in a thousand."""
    return lambda *xs: [y * 1.001 for y in f(*xs)]


def refuses(*args, **kwargs):
    raise ValueError("no")


SLIGHTLY_WRONG = SimpleNamespace(
    vjp=lambda f, *xs: (f(*xs), aotfunc.vjp(off_by_a_little(f), *xs)[1]),
    jvp=lambda f, xs, ts: (f(*xs), aotfunc.jvp(off_by_a_little(f), xs, ts)[1]),
    vmap=lambda f, **how: aotfunc.vmap(lambda *xs: [y * 1.001 for y in f(*xs)], **how),
)


@pytest.mark.parametrize("composition", table.COMPOSITIONS)
def test_outcomes(composition, monkeypatch):
    def judged(lib):
        monkeypatch.setitem(table.LIBRARIES, "judged", lib)
        return table.check("mul", "float64", composition, "judged")

    assert judged(aotfunc) == "right"
    assert judged(SLIGHTLY_WRONG).startswith("wrong: ")
    assert (
        judged(SimpleNamespace(vjp=refuses, jvp=refuses, vmap=refuses)) == "error: ValueError: no"
    )


def test_numbers_decide_where_autograd_has_no_answer(monkeypatch):
    assert "derivative" in table.check("cdist", "float64", "vjpvjp", "torch")
    assert table.check("cdist", "float64", "vjpvjp", "aotfunc") == "right"
    monkeypatch.setitem(table.LIBRARIES, "judged", SLIGHTLY_WRONG)
    assert table.check("cdist", "float64", "vjpvjp", "judged").startswith("wrong: ")


def test_silent_zeros_of_forward_ad_are_no_reference():
    assert table.check("NumpyMulCustomOp", "float64", "jvp", "torch").startswith("wrong: ")
    assert table.check("NumpyMulCustomOp", "float64", "jvp", "aotfunc") == "right"


@pytest.mark.skipif(
    report.version() != report.VERSION, reason="the stored matrix is about another PyTorch's ops"
)
def test_the_stored_matrix_has_every_cell():
    assert report.read().keys() == report.merged({}).keys()
    assert not any("?" in letters for by in report.read().values() for letters in by.values())


def test_a_run_replaces_what_it_ran():
    key = ("sin", "float64")
    before = report.merged({})
    after = report.merged(
        {("aotfunc", *key, "vmap"): "wrong: by much", ("torch", *key, "vmapjvp"): "none: why"}
    )
    assert {k for k in after if after[k] != before[k]} == {key}
    assert after[key]["aotfunc"] == before[key]["aotfunc"][:2] + "W" + before[key]["aotfunc"][3:]
    assert after[key]["torch"] == before[key]["torch"][:6] + "-"
    assert {len(letters) for by in after.values() for letters in by.values()} == {
        len(table.COMPOSITIONS)
    }
