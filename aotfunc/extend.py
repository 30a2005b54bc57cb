"""The page for authors of ops and backends: verbs that state an op's rules, a check of them, and
backends by name.

A rule is plain tensor code; conventions are in :mod:`aotfunc.transforms.rules.table`. Say what an
op's derivative is by one of ``pointwise``, ``linear``, ``nondiff``, or by ``vjp_of`` and, where
the transposed reverse rule is not good enough, ``jvp_of``; how it is batched by ``vmap_of``; or,
instead of all that, what it consists of by ``decompose_as``.

>>> library = torch.library.Library("extend_example", "DEF")
>>> _ = library.define("cube(Tensor x) -> Tensor")
>>> library.impl("cube", lambda x: x * x * x, "CompositeExplicitAutograd")
>>> cube = torch.ops.extend_example.cube
>>> pointwise(cube, lambda g, out, x: 3 * g * x * x)
>>> check_rule(cube, (torch.randn(3),))
"""

from .api.check import check_rule as check_rule
from .backends import Backend as Backend
from .backends import register as register
from .transforms.rules.batching import elementwise as elementwise
from .transforms.rules.batching import shifted as shifted
from .transforms.rules.table import decompose_as as decompose_as
from .transforms.rules.table import jvp_of as jvp_of
from .transforms.rules.table import linear as linear
from .transforms.rules.table import nondiff as nondiff
from .transforms.rules.table import pointwise as pointwise
from .transforms.rules.table import vjp_of as vjp_of
from .transforms.rules.table import vmap_of as vmap_of
