"""The names of ``functorch.compile``."""

from .aot import Compiled as Compiled
from .aot import aot_function as aot_function
from .aot import aot_module as aot_module
from .aot import jit as jit
from .backends import register as register
from .partition import default_partition as default_partition
from .partition import min_cut_rematerialization_partition as min_cut_rematerialization_partition


def nop(fx_g, _):  # type: ignore[no-untyped-def]
    """The compiler that does nothing: the graph module itself."""
    return fx_g


def print_compile(fx_g, _):  # type: ignore[no-untyped-def]
    """The compiler that prints the graph's code and does nothing else."""
    print(fx_g.code)
    return fx_g
