"""The wheel has all that the package needs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aotfunc.native import toolchain

ROOT = Path(__file__).parents[1]

PROGRAM = """
from pathlib import Path
import torch, aotfunc
x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
f = lambda x: torch.tanh(x @ x.t()).sum()
got = torch.autograd.grad(aotfunc.jit(f, backend=BACKEND)(x), x)[0]
assert torch.allclose(got, torch.autograd.grad(f(x), x)[0])
folder = Path(aotfunc.__file__).parent
assert all((folder / "viewer" / f"page.{kind}").exists() for kind in ("html", "css", "js"))
print(folder)
"""


@pytest.mark.limit(180)
def test_an_installed_wheel_works(tmp_path):
    source, wheels, there = (tmp_path / name for name in ("source", "wheels", "installed"))
    shutil.copytree(ROOT / "aotfunc", source / "aotfunc")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, source], check=True)
    (wheel,) = wheels.glob("aotfunc-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", there, wheel], check=True)
    backend = "cpp" if toolchain.has_compiler() else "eager"
    ran = subprocess.run(
        [sys.executable, "-c", f"BACKEND = {backend!r}{PROGRAM}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(there)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(there / "aotfunc")
