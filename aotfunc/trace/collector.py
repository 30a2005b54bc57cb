"""Pause Python's garbage collector while any thread makes a graph."""

from __future__ import annotations

import gc
import os
import threading

#: the threads that make graphs; the collector is the process's, so the last thread switches it on
#: again
_pauses: dict[object, int] = {}
_lock = threading.Lock()
_was_on = False


class paused_gc:
    """Pause cyclic garbage collection: graphs are many small objects that live on, and scanning
    them again and again would be most of the time of making them."""

    __slots__ = ()

    def __enter__(self) -> None:
        global _was_on
        try:
            with _lock:
                if not _pauses:
                    _was_on = gc.isenabled()
                _pauses[self] = threading.get_ident()
                gc.disable()
        except BaseException:  # Ctrl-C
            _leave(self)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            with _lock:  # as _leave does, in one frame
                _pauses.pop(self, None)
                if not _pauses and _was_on:
                    gc.enable()
        except BaseException:  # Ctrl-C came in between
            _leave(self)
            raise


def _leave(mine: object) -> None:
    with _lock:
        _pauses.pop(mine, None)
        if not _pauses and _was_on:
            gc.enable()


def _alone() -> None:
    """Forget other threads: in a forked process only the thread that forked goes on."""
    global _lock
    _lock = threading.Lock()
    for key in [k for k, thread in _pauses.items() if thread != threading.get_ident()]:
        del _pauses[key]
        if not _pauses and _was_on:
            gc.enable()


os.register_at_fork(after_in_child=_alone)
