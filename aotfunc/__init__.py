"""aotfunc: function transforms for PyTorch as graph-to-graph passes."""

from .trace.collector import paused_gc

__version__ = "0.1.0"

with paused_gc():  # of the objects that PyTorch has made by now, one collection takes longer than these imports
    from .aot import aot_function as aot_function
    from .aot import aot_module as aot_module
    from .aot import jit as jit
    from .batch import chunk_vmap as chunk_vmap
    from .batch import debug_unwrap as debug_unwrap
    from .batch import vmap as vmap
    from .cache import clear_caches as clear_caches
    from .check import check_grads as check_grads
    from .covered import coverage as coverage
    from .func import functionalize as functionalize
    from .func import grad as grad
    from .func import grad_and_value as grad_and_value
    from .func import jvp as jvp
    from .func import linearize as linearize
    from .func import vjp as vjp
    from .jacobians import hessian as hessian
    from .jacobians import jacfwd as jacfwd
    from .jacobians import jacrev as jacrev
    from .module import make_fx as make_fx
    from .partition import default_partition as default_partition
    from .partition import min_cut_rematerialization_partition as min_cut_rematerialization_partition
    from .patch import patch_torch_func as patch_torch_func
    from .rearrange import rearrange as rearrange
    from .stateless import combine_state_for_ensemble as combine_state_for_ensemble
    from .stateless import functional_call as functional_call
    from .stateless import make_functional as make_functional
    from .stateless import make_functional_with_buffers as make_functional_with_buffers
    from .stateless import replace_all_batch_norm_modules_ as replace_all_batch_norm_modules_
    from .stateless import stack_module_state as stack_module_state
    from .transforms.patches import restore_torch as restore_torch
