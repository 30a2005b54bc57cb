"""What every test starts from: a seed, one thread, default global state, a time limit of its
own."""

import gc
import os
import signal

os.environ.setdefault(
    "AOTFUNC_DEBUG", "2"
)  # graphs are verified and values compared with them, in tests always

import pytest
import torch

import aotfunc
from aotfunc import backends, debug
from aotfunc.runtime.native_node import Nodes, nodes

torch.set_num_threads(1)

# nodes of autograd are Python's, whatever has been compiled on this machine, but for some tests
nodes().library = nodes().extension = None

LIMIT_S = 60

# tests compare bits, and compile much: they name no backend and get eager, or the one that
# AOTFUNC_BACKEND names, as those then do that name eager
if os.environ.setdefault("AOTFUNC_BACKEND", "eager") != "eager":
    backends.REGISTRY["eager"] = backends.lookup("auto")
    LIMIT_S = 300


def pytest_configure(config):
    config.addinivalue_line(
        "markers", f"limit(seconds): time limit of one test (default {LIMIT_S} s)"
    )
    config.addinivalue_line(
        "markers", "eager: a test of bits, ops or graphs that only the eager backend has"
    )


def pytest_collection_modifyitems(items):
    if backends.REGISTRY["eager"] != backends.EAGER:
        for item in items:
            if item.get_closest_marker("eager"):
                item.add_marker(pytest.mark.skip("only the eager backend's"))


def pytest_collection_finish():
    """The garbage collector need not look through all modules and tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def compared():
    """Every value is compared with what the graph says of it, in code that is made now."""
    aotfunc.clear_caches()
    level, debug.LEVEL = debug.LEVEL, 2
    yield
    debug.LEVEL = level
    aotfunc.clear_caches()


@pytest.fixture(scope="session")
def node_library():
    """The nodes of autograd in C++: for its compiler a first test waits, once on a machine."""
    found = Nodes()
    if found.library is None:
        found.compile()
    return found.library or pytest.skip("there is no C++ compiler, or no headers")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def global_state_restored():
    """A test that leaves grad mode, default dtype or autocast changed fails itself, not the next
    one."""
    yield
    changed = []
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        changed.append("grad mode")
    if torch.get_default_dtype() != torch.float32:
        torch.set_default_dtype(torch.float32)
        changed.append("default dtype")
    if torch.is_autocast_enabled("cpu"):
        torch.set_autocast_enabled("cpu", False)
        changed.append("autocast")
    assert not changed, f"the test left changed: {', '.join(changed)}"


@pytest.fixture(autouse=True)
def time_limit(request):
    """Fail a test that hangs (a compiler's favourite bug) instead of stopping the whole run."""
    marker = request.node.get_closest_marker("limit")
    seconds = marker.args[0] if marker else LIMIT_S

    def expired(signum, frame):
        raise TimeoutError(f"test ran longer than {seconds} s")

    old = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)
