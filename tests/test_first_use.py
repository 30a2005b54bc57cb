"""No first call of a fresh process imports Dynamo, Inductor or sympy, which take longer than all
else together."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_first_calls_import_nothing_heavy(backend):
    command = [sys.executable, "-W", "ignore", "-m", "tests.first_calls"]
    env = {**os.environ, "AOTFUNC_BACKEND": backend}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
