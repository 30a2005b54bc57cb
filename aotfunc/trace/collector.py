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
_enabled, _enable, _disable = gc.isenabled, gc.enable, gc.disable


class paused_gc:
    """Pause cyclic garbage collection: graphs are many small objects that live on, and scanning
    them again and again would be most of the time of making them."""

    __slots__ = ()

    def __enter__(self) -> None:
        global _was_on
        try:
            with _lock:
                if not _pauses:
                    _was_on = _enabled()
                _pauses[self] = threading.get_ident()
                _disable()
        except BaseException:  # Ctrl-C
            _leave(self)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            with _lock:  # as _leave does, in one frame
                _pauses.pop(self, None)
                if not _pauses and _was_on:
                    _enable()
        except BaseException:  # Ctrl-C came in between
            _leave(self)
            raise


def _leave(mine: object) -> None:
    with _lock:
        _pauses.pop(mine, None)
        if not _pauses and _was_on:
            _enable()


def isenabled() -> bool:
    """Return what ``gc.isenabled()`` says outside of captures."""
    return _was_on if _pauses else _enabled()


def set_collecting(on: bool) -> None:
    """Switch the collector on or off, after the captures under way if there are any."""
    global _was_on
    if _pauses:
        _was_on = on
    else:
        (_enable if on else _disable)()


def _alone() -> None:
    """Forget other threads: in a forked process only the thread that forked goes on."""
    global _lock
    _lock = threading.Lock()
    for key in [k for k, thread in _pauses.items() if thread != threading.get_ident()]:
        del _pauses[key]
        if not _pauses and _was_on:
            _enable()


os.register_at_fork(after_in_child=_alone)
