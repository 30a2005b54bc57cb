"""The disk cache of compiled kernels: a private directory of files that carry their own digest.

A process writes a file elsewhere and renames it, so that others see all of it or nothing; what is
cut off or changed later is compiled again. Where the directory cannot be used, a temporary one
takes its place until the process ends."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from ..errors import BackendWarning, CompilerError

SIZE = hashlib.sha256().digest_size


def directory() -> Path:
    """Return the directory of compiled kernels: ``kernels`` in ``AOTFUNC_CACHE_DIR``, else in
    ``aotfunc`` in the user's cache directory. Raises OSError where others could write there."""
    named, cache = os.environ.get("AOTFUNC_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    above = Path(named) if named else Path(cache or "~/.cache") / "aotfunc"
    path = above.expanduser() / "kernels"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is not a directory")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{path} can be written by other users")
    return path


@functools.cache
def temporary(pid: int) -> Path:
    """Return the directory that process ``pid`` uses instead."""
    path = tempfile.mkdtemp(prefix="aotfunc-")
    atexit.register(removed, path, pid)
    return Path(path)


def removed(path: str, pid: int) -> None:
    """Remove the directory, but not from a forked child."""
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)


def digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()


def intact(path: Path) -> bool:
    """Return whether this file is there, and as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return content[-SIZE:] == digest(path.stem, content[:-SIZE])


def kernel_directory() -> Path:
    """Return the directory in which this process looks for compiled kernels."""
    try:
        return directory()
    except OSError:
        return temporary(os.getpid())


def find(key: str) -> Path | None:
    """Return the compiled kernel of this key, or None."""
    path = kernel_directory() / f"{key}.so"
    return path if intact(path) else None


def find_any(start: str) -> Path | None:
    """Return a compiled kernel whose key begins so, or None."""
    return next(filter(intact, kernel_directory().glob(f"{start}*.so")), None)


def compile_and_keep(key: str, source: str, build: Callable[[Path, Path], None]) -> Path:
    """Let ``build(source file, library)`` make the compiled kernel of this key, and keep both.
    Raises CompilerError, with the source kept."""
    try:
        return build_in(directory(), key, source, build)
    except OSError as e:
        warnings.warn(
            f"compiled kernels are kept for this process only, in a temporary directory: {e}; the "
            "environment variable AOTFUNC_CACHE_DIR names a directory to keep them in",
            BackendWarning,
            stacklevel=2,
        )
    try:
        return build_in(temporary(os.getpid()), key, source, build)
    except OSError as e:
        error = CompilerError(f"there is no place for a compiled kernel: {e}")
        error.source = source
        raise error from e


def build_in(root: Path, key: str, source: str, build: Callable[[Path, Path], None]) -> Path:
    kept, result = root / f"{key}.cpp", root / f"{key}.so"
    work = tempfile.mkdtemp(dir=root)  # a forked child must not remove it
    try:
        text, library = Path(work, kept.name), Path(work, result.name)
        text.write_text(source)
        try:
            build(text, library)
        except CompilerError as e:
            os.replace(text, kept)
            error = CompilerError(f"{e}\nThe source is kept in {kept}")
            error.source = source
            raise error from None
        content = library.read_bytes()
        library.write_bytes(content + digest(key, content))  # the loader ignores what follows
        os.replace(text, kept)
        os.replace(library, result)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result
