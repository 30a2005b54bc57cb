"""``python -m aotfunc``."""

import sys

import pytest

from aotfunc import __main__ as commands

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
    monkeypatch.setattr(sys, "path", [*sys.path])


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


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        (":h", "", "defines no function 'h'"),
        (":scale", "", "defines no function 'scale'"),
        ("", "", "names no file; write FILE.py:function"),
        ("s:f", "", "names no file; write FILE.py:function"),
        (":f", "torch.zeros(", "--args 'torch.zeros(': invalid syntax"),
        (":f", "zeros(3)", "--args 'zeros(3)': name 'zeros' is not defined"),
        (":f", "torch.zeros(3)", "--args 'torch.zeros(3)': missing a required argument: 'by'"),
    ],
)
def test_mistakes_are_one_line(file, capsys, name, args, said):
    with pytest.raises(SystemExit):
        commands.main(["bench", f"{file}{name}", "--args", args])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_error_of_the_function_is_raised(file):
    with pytest.raises(AttributeError, match="no attribute 'sin'"):
        commands.main(["bench", f"{file}:f", "--args", "3, 2"])


def test_a_file_finds_its_neighbours(tmp_path, capsys):
    (tmp_path / "a_neighbour.py").write_text("def f(x): return x.sin()")
    (tmp_path / "code.py").write_text("from a_neighbour import f")
    commands.main(["bench", f"{tmp_path / 'code.py'}:f", "--args", "torch.zeros(3)"])
    assert "eager" in capsys.readouterr().out


def test_clear_cache(tmp_path):
    kept = tmp_path / "cache" / "kernels" / "kernel.so"
    kept.parent.mkdir(parents=True, mode=0o700)
    kept.write_text("code")
    commands.main(["clear-cache"])
    assert not kept.exists()
