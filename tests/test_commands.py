"""``python -m aotfunc``."""

import pytest

from aotfunc import __main__ as commands
from aotfunc.errors import AotfuncError

FILE = """
import torch
from aotfunc import grad

scale = 2.0
def f(x, by):
    return (x * by).sin().sum()

g = grad(f)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Inductor takes half a minute; the user's cache is not ours to empty."""
    monkeypatch.setattr(commands, "BACKENDS", ("eager",))
    monkeypatch.setenv("AOTFUNC_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "code.py").write_text(FILE)
    return str(tmp_path / "code.py")


def test_doctor_says_what_works(capsys, monkeypatch):
    monkeypatch.setattr(commands, "BACKENDS", ("eager", "none"))
    commands.main(["doctor"])
    printed = capsys.readouterr().out
    assert "PyTorch" in printed and "backend eager: works" in printed
    assert "backend none: BackendError: there is no backend 'none'" in printed


def test_doctor_says_why_a_cache_is_not_used(tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").write_text("no directory")
    commands.main(["doctor"])
    assert "cache: not used: " in capsys.readouterr().out


def test_show_writes_a_page(file, tmp_path, capsys):
    page = tmp_path / "page.html"
    commands.main(["show", f"{file}:g", "--args", "torch.zeros(3), scale", "--to", str(page)])
    assert capsys.readouterr().out == f"{page}: <page of 2 programs: capture, vjp>\n"
    assert page.exists()


def test_bench_prints_times(file, capsys):
    commands.main(["bench", f"{file}:g", "--args", "torch.zeros(3), scale"])
    as_it_is, eager = capsys.readouterr().out.splitlines()
    assert as_it_is.endswith("µs") and "first call" in eager


def test_a_name_that_is_not_there(file):
    with pytest.raises(AotfuncError, match="defines no 'h'"):
        commands.main(["bench", f"{file}:h"])


def test_clear_cache(tmp_path):
    kept = tmp_path / "cache" / "kernels" / "kernel.so"
    kept.parent.mkdir(parents=True, mode=0o700)
    kept.write_text("code")
    commands.main(["clear-cache"])
    assert not kept.exists()
