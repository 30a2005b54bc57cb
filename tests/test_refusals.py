"""What is refused is refused by jit and by aot_function, in the words of docs/refusals.md."""

import pytest

from aotfunc import aot_function, jit
from tests.refusals import PAGE, PROGRAMS, message, table

COMPILERS = {"jit": jit, "aot_function": lambda f: aot_function(f, "eager")}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_refused(name, compiler):
    assert message(PROGRAMS[name], COMPILERS[compiler])


def test_the_page_says_what_is_said():
    assert PAGE.read_text() == table()
