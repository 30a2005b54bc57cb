"""No first call of a fresh process imports Dynamo, Inductor or sympy, which take longer than all
else together."""

import subprocess
import sys


def test_first_calls_import_nothing_heavy():
    command = [sys.executable, "-W", "ignore", "-m", "tests.first_calls"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
