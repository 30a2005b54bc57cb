"""aotfunc: function transforms for PyTorch as graph-to-graph passes."""

from .func import chunk_vmap as chunk_vmap
from .func import functionalize as functionalize
from .func import grad as grad
from .func import grad_and_value as grad_and_value
from .func import hessian as hessian
from .func import jacfwd as jacfwd
from .func import jacrev as jacrev
from .func import jvp as jvp
from .func import linearize as linearize
from .func import vjp as vjp
from .func import vmap as vmap
