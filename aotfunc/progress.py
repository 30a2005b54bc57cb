"""Say what long captures and compilations do, and how far they are, on a line of stderr."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

#: seconds until there is something to say, and between two looks
AFTER, BETWEEN = 2.0, 0.1
#: seconds between two lines that are not rewritten
APART = 10.0

TERMINAL = sys.stderr is not None and sys.stderr.isatty()
_shown = ContextVar("shown", default=bool(int(os.environ.get("AOTFUNC_PROGRESS", TERMINAL))))


#: return whether progress is shown
is_shown = _shown.get


@contextmanager
def show_progress(shown: bool = True) -> Iterator[None]:
    """Show, or do not show, what captures and compilations inside that take longer than two
    seconds do, and how far they are.

    Without this a line is shown, and rewritten, where stderr is a terminal; elsewhere there is
    none. The environment variable ``AOTFUNC_PROGRESS``, 0 or 1, decides for the whole process.

    >>> with show_progress():
    ...     y = jit(torch.sin)(torch.zeros(3))  # far too quick
    """
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


class doing:
    """A step of this thread's, for a ``with`` block; other threads ask ``say()`` for its text."""

    __slots__ = ("began", "say", "steps")
    began: float

    def __init__(self, say: Callable[[], str]) -> None:
        self.say = say

    def __enter__(self) -> None:
        self.steps: list[doing] | None = WATCH.begin(self) if is_shown() else None

    def __exit__(self, *_: Any) -> None:
        if self.steps is not None:
            self.steps.remove(self)
            if not self.steps:
                WATCH.end()


def with_progress(what: str, items: Sequence[T]) -> Iterator[T]:
    """Yield the items; the step that this is says how many there have been."""
    done = 0
    with doing(lambda: f"{what}, {done:,} of {len(items):,}"):
        for done, item in enumerate(items):  # noqa: B007
            yield item


def timed(what: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make a decorator: the step that a call is says how many seconds it has taken."""

    def decorate(f: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> T:
            begun = WATCH.clock()
            with doing(lambda: f"{what}, {WATCH.clock() - begun:.0f} s"):
                return f(*args, **kwargs)

        return call

    return decorate


class Watch:
    """What the threads are doing, and the thread that says it, which lives while they do."""

    def __init__(self, screen: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.screen, self.clock = screen, clock
        self.running: dict[int, list[doing]] = {}  # by thread, the outermost step first
        self.alone()

    def alone(self) -> None:
        """Forget the other threads: a new process has none."""
        here = threading.get_ident()
        self.running = {i: steps for i, steps in self.running.items() if i == here}
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def begin(self, step: doing) -> list[doing]:
        step.began = self.clock()
        with self.lock:
            steps = self.running.setdefault(threading.get_ident(), [])
            steps.append(step)
            if self.thread is None:
                self.thread = threading.Thread(target=self.look, name="progress", daemon=True)
                self.thread.start()
        return steps

    def end(self) -> None:
        """Clear the line, before what comes next is printed, where nothing more is being done."""
        with self.lock:
            self.running = {i: steps for i, steps in self.running.items() if steps}
            if not self.running:
                self.screen.clear()

    def look(self) -> None:
        while True:
            time.sleep(BETWEEN)
            with self.lock:
                if not self.running:
                    self.thread = None
                    return
                self.say()

    def say(self) -> None:
        """Show the steps of the thread that has been busy for the longest time."""
        now = self.clock()
        busy = [steps for steps in map(tuple, self.running.values()) if steps]
        first = min(busy, key=lambda steps: steps[0].began, default=())
        if first and (seconds := now - first[0].began) > AFTER:
            text = " › ".join([step.say() for step in first])
            self.screen.show(seconds, f"aotfunc, {seconds:.0f} s: {text}")


class Screen:
    """One line, rewritten on a terminal by rich; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self.live: Any = None
        self.due = 0.0

    def show(self, seconds: float, text: str) -> None:
        try:
            if not TERMINAL:
                raise ImportError
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text
        except ImportError:
            if seconds >= self.due:
                print(text, file=sys.stderr, flush=True)
                self.due = seconds + APART
            return
        if self.live is None:
            options: Any = {"auto_refresh": False, "transient": True}
            options |= {"redirect_stdout": False, "redirect_stderr": False}
            self.live = Live(console=Console(stderr=True), **options)
            self.live.start()
        self.live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def clear(self) -> None:
        self.due = 0.0
        if self.live is not None:
            self.live.stop()
            self.live = None


WATCH = Watch(Screen())
os.register_at_fork(after_in_child=WATCH.alone)
