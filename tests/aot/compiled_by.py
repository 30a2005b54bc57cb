"""The ways to a compiled function that a table of programs is tried with."""

import pytest

from aotfunc import aot_function, jit

COMPILERS = {
    "jit": jit,
    "aot_function": lambda f: aot_function(f, "eager"),
    "jit of jit": lambda f: jit(jit(f)),
    "inlined": lambda f: jit(lambda *args, **kwargs: f(*args, **kwargs)),
}
every_compiler = pytest.mark.parametrize("compiler", COMPILERS)
