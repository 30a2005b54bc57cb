"""pytest in a process of its own, with one library's transforms in torch.func's place: which tests
call one, and what became of them.

python -m benchmarks.clients_tests LIBRARY RESULTS [pytest's arguments]: LIBRARY is torch.func or
aotfunc; RESULTS, a JSON file, gets {test: [calls of a transform, outcome, seconds of processor
time, those of a third run of it in the same process or None where that fails]}."""

from __future__ import annotations

import importlib
import json
import sys
import time
from functools import partial, wraps
from pathlib import Path

import pytest

import aotfunc
from aotfunc.api.patch import PLACES


class Results:
    """Counts what a test calls, its fixtures included, by a wrapper that both libraries go
    through."""

    def __init__(self) -> None:
        self.calls, self.start = 0, 0.0
        self.tests: dict[str, list] = {}
        for place, names in PLACES.items():
            module = importlib.import_module(place)
            for name in filter(partial(hasattr, module), names):
                setattr(module, name, self.counted(getattr(module, name)))

    def counted(self, transform):
        @wraps(transform)
        def call(*args, **kwargs):
            self.calls += 1
            return transform(*args, **kwargs)

        return call

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.tests[item.nodeid] = [0, "passed", 0.0, None]
        self.calls, self.start = 0, time.process_time()
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item):
        """Run a test that has passed twice more."""
        test = self.tests[item.nodeid]
        test[0], test[2] = self.calls, time.process_time() - self.start
        if test[:2] == [0, "passed"] or test[1] != "passed":
            return
        given = {name: item.funcargs[name] for name in item._fixtureinfo.argnames}
        try:
            for _ in range(2):
                start = time.process_time()
                item.obj(**given)
        except Exception:
            return
        test[3] = time.process_time() - start

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self.tests[report.nodeid][1] = report.outcome


def main() -> int:
    library, path, *options = sys.argv[1:]
    if library == "aotfunc":
        aotfunc.patch_torch_func()
    results = Results()
    status = pytest.main(options, plugins=[results])
    Path(path).write_text(json.dumps(results.tests))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
