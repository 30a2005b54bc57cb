"""The disk cache of kernels: compiled once, never loaded when damaged, and a clear word where it,
or the compiler, is missing."""

import errno
import os
import subprocess
import warnings

import pytest
import torch

from aotfunc.backends.loops import native
from aotfunc.errors import BackendWarning, CompilerError
from aotfunc.native import store, toolchain

SOURCE = """
extern "C" void kernel(long begin, long end, const long *, void *const *buffers) {
  for (long i = begin; i < end; i++) ((float *)buffers[0])[i] = i + 1;
}"""


@pytest.fixture
def compiled(cache, monkeypatch):
    """How often the compiler ran."""
    runs = []
    compile = toolchain.compile
    monkeypatch.setattr(toolchain, "compile", lambda *paths: (runs.append(1), compile(*paths)))
    return runs


def right(source: str = SOURCE) -> bool:
    """Whether the kernel, loaded as a new process would, computes what it should."""
    native.LOADED.clear()
    x = torch.zeros(3)
    native.load_kernels(source)["kernel"](3, (), (x,))
    return x.tolist() == [1, 2, 3]


def entry(cache):
    (path,) = cache.glob("*.so")
    return path


def test_compiled_once(cache, compiled):
    assert right() and right() and len(compiled) == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert sorted(p.suffix for p in cache.iterdir()) == [".cpp", ".so"]
    assert entry(cache).with_suffix(".cpp").read_text() == SOURCE


def test_the_warm_path_starts_no_process(cache, monkeypatch):
    assert right()

    def none(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", none)
    monkeypatch.setattr(os, "system", none)
    assert right()


DAMAGE = {
    "cut off": lambda whole: whole[:1000],
    "cut off by one": lambda whole: whole[:-1],
    "empty": lambda whole: b"",
    "one bit changed": lambda whole: whole[:700] + bytes([whole[700] ^ 1]) + whole[701:],
    "longer": lambda whole: whole + b"x",
    "without its digest": lambda whole: whole[: -store.SIZE],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_compiled_again(cache, compiled, kind):
    assert right()
    path = entry(cache)
    whole = path.read_bytes()
    path.unlink()  # it is mapped
    path.write_bytes(DAMAGE[kind](whole))
    assert right() and len(compiled) == 2 and store.intact(path)


def test_another_kernel_under_this_name(cache, compiled):
    assert right()
    path = entry(cache)
    right(SOURCE.replace("+ 1", "+ 2"))
    (other,) = set(cache.glob("*.so")) - {path}
    path.unlink()
    path.write_bytes(other.read_bytes())
    assert right() and len(compiled) == 3


def test_eight_processes_at_once(cache):
    children = []
    for _ in range(8):
        pid = os.fork()
        if not pid:
            os._exit(0 if right() else 1)
        children.append(pid)
    assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)
    assert sorted(p.suffix for p in cache.iterdir()) == [".cpp", ".so"]


@pytest.mark.parametrize("what", ["flags", "processor", "version", "compiler"])
def test_the_key(cache, compiled, monkeypatch, tmp_path, what):
    assert right()
    if what == "flags":
        monkeypatch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-g"))
    elif what == "processor":
        monkeypatch.setattr(toolchain, "processor", lambda: "another")
    elif what == "version":
        monkeypatch.setattr(torch, "__version__", "0")
    else:
        wrapper = tmp_path / "compiler"
        wrapper.write_text(f'#!/bin/sh\nexec {toolchain.compiler()[0]} "$@"\n')
        wrapper.chmod(0o700)
        monkeypatch.setenv("CXX", f"{wrapper} -DANY")
    assert right() and len(compiled) == 2


@pytest.mark.parametrize("variable, value", [("PATH", ""), ("CXX", "no-such-compiler -x")])
def test_no_compiler(cache, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(CompilerError, match=r"there is no C\+\+ compiler"):
        right()


def test_what_the_compiler_refuses(cache):
    with pytest.raises(CompilerError, match=r"(?s)wrong.*The source is kept in") as e:
        right("int wrong")
    (kept,) = cache.iterdir()
    assert str(kept) in str(e.value) and kept.read_text() == e.value.source == "int wrong"


def test_a_compiler_that_does_not_run(cache, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("nothing that runs")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CompilerError, match="cannot be run"):
        right()


def place(kind, tmp_path, monkeypatch):
    """Make the disk cache unusable."""
    root = tmp_path / "chosen"
    root.mkdir()
    if kind == "a file":
        root = tmp_path / "file"
        root.write_text("")
    elif kind == "others may write":
        (root / "kernels").mkdir()
        (root / "kernels").chmod(0o777)
    elif kind == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: -1)
    elif kind == "a link":
        (root / "kernels").symlink_to(tmp_path)
    elif kind == "read-only":
        make = store.tempfile.mkdtemp

        def mkdtemp(suffix=None, prefix=None, dir=None):
            if str(root) in str(dir):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
            return make(suffix, prefix, dir)

        monkeypatch.setattr(store.tempfile, "mkdtemp", mkdtemp)
    elif kind == "full":
        run = subprocess.run
        done = subprocess.CompletedProcess([], 1, f"cc1plus: {os.strerror(errno.ENOSPC)}")
        there = lambda command: str(root) in str(command)
        monkeypatch.setattr(subprocess, "run", lambda c, **kw: done if there(c) else run(c, **kw))
    monkeypatch.setenv("AOTFUNC_CACHE_DIR", str(root))


@pytest.mark.parametrize(
    "kind", ["a file", "others may write", "another user's", "a link", "read-only", "full"]
)
def test_a_temporary_directory_instead(cache, tmp_path, monkeypatch, kind):
    place(kind, tmp_path, monkeypatch)
    with pytest.warns(BackendWarning, match="for this process only"):
        assert right()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert right()


def test_what_a_full_directory_holds_is_used(cache, compiled, tmp_path, monkeypatch):
    assert right()
    monkeypatch.setattr(store, "compile_and_keep", lambda *args: pytest.fail("written to"))
    assert right()


def test_no_place_at_all(cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(store, "build_in", full)
    with pytest.warns(BackendWarning), pytest.raises(CompilerError, match="no place") as e:
        right()
    assert e.value.source == SOURCE
