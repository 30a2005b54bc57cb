"""Each example runs to its end with small settings; the asserts in it are the test."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path: Path, monkeypatch, tmp_path):
    if path.stem in ("digits", "distributed"):
        pytest.importorskip("sklearn")
        pytest.importorskip("rich")
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # some leave pages
    rng_state = torch.get_rng_state()
    try:
        runpy.run_path(str(path), run_name=path.stem)["main"](quick=True)
    finally:
        torch.set_rng_state(rng_state)
