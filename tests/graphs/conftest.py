"""``EXPECTTEST_ACCEPT=1 pytest tests/graphs`` rewrites the golden texts,
from the last to the first, so that lines keep their numbers."""

import os


def pytest_collection_modifyitems(items):
    if os.environ.get("EXPECTTEST_ACCEPT"):
        items.reverse()
