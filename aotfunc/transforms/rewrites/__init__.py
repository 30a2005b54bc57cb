"""The local rewritings of tidying, a file for each subject; importing it fills the table of
:mod:`.table`.
"""

import aotfunc.transforms.rewrites.arithmetic
import aotfunc.transforms.rewrites.broadcasting
import aotfunc.transforms.rewrites.constants
import aotfunc.transforms.rewrites.redundant
import aotfunc.transforms.rewrites.views  # noqa: F401

from .table import REWRITES

__all__ = ["REWRITES"]
