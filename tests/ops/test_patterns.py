"""Patterns of the op database's Jacobians and of their gradients' lack no entry."""

import pytest

from tests.ops.patterns import AMBIGUOUS, NAMES, compared
from tests.sweeps import every


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of ops that it will remove
@pytest.mark.parametrize("name", every(60, [n for n in NAMES if n not in AMBIGUOUS]))
def test_patterns_lack_no_entry(name):
    assert [c for c in compared(name, 1) if c.missing] == []
