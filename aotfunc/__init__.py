"""aotfunc: function transforms for PyTorch as graph-to-graph passes."""

from .trace.collector import paused_gc as _paused_gc

__version__ = "0.1.0"

# a collection that visits PyTorch's objects takes longer than these imports
with _paused_gc():
    from . import compile as compile
    from .api.associative_scan import associative_scan as associative_scan
    from .api.axes import all_gather as all_gather
    from .api.axes import axis_index as axis_index
    from .api.axes import axis_size as axis_size
    from .api.axes import pmax as pmax
    from .api.axes import pmean as pmean
    from .api.axes import pmin as pmin
    from .api.axes import psum as psum
    from .api.check import check_grads as check_grads
    from .api.checkpoint import checkpoint as checkpoint
    from .api.checkpoint import checkpoint_name as checkpoint_name
    from .api.control_flow import cond as cond
    from .api.control_flow import map as map
    from .api.control_flow import scan as scan
    from .api.control_flow import switch as switch
    from .api.control_flow import while_loop as while_loop
    from .api.coverage import coverage as coverage
    from .api.custom import custom_jvp as custom_jvp
    from .api.custom import custom_vjp as custom_vjp
    from .api.custom import custom_vmap as custom_vmap
    from .api.export import Exported as Exported
    from .api.export import export as export
    from .api.export import load as load
    from .api.fixed_size import masked_select as masked_select
    from .api.fixed_size import nonzero as nonzero
    from .api.fixed_size import unique as unique
    from .api.func import functionalize as functionalize
    from .api.func import grad as grad
    from .api.func import grad_and_value as grad_and_value
    from .api.func import jvp as jvp
    from .api.func import linearize as linearize
    from .api.func import vjp as vjp
    from .api.fwd_and_bwd import fwd_and_bwd as fwd_and_bwd
    from .api.implicit import custom_linear_solve as custom_linear_solve
    from .api.implicit import custom_root as custom_root
    from .api.implicit import linear_transpose as linear_transpose
    from .api.jacobians import hessian as hessian
    from .api.jacobians import jacfwd as jacfwd
    from .api.jacobians import jacrev as jacrev
    from .api.jet import diag_hessian as diag_hessian
    from .api.jet import ggn as ggn
    from .api.jet import hvp as hvp
    from .api.jet import jet as jet
    from .api.jet import laplacian as laplacian
    from .api.jit import aot_function as aot_function
    from .api.jit import aot_module as aot_module
    from .api.jit import jit as jit
    from .api.make_fx import make_fx as make_fx
    from .api.patch import patch_torch_func as patch_torch_func
    from .api.rearrange import rearrange as rearrange
    from .api.shapes import closure_convert as closure_convert
    from .api.shapes import eval_shape as eval_shape
    from .api.sparse import sparse_hessian as sparse_hessian
    from .api.sparse import sparse_jacobian as sparse_jacobian
    from .api.stateless import combine_state_for_ensemble as combine_state_for_ensemble
    from .api.stateless import functional_call as functional_call
    from .api.stateless import make_functional as make_functional
    from .api.stateless import make_functional_with_buffers as make_functional_with_buffers
    from .api.stateless import replace_all_batch_norm_modules_ as replace_all_batch_norm_modules_
    from .api.stateless import stack_module_state as stack_module_state
    from .api.vmap import chunk_vmap as chunk_vmap
    from .api.vmap import debug_unwrap as debug_unwrap
    from .api.vmap import vmap as vmap
    from .cache import clear_caches as clear_caches
    from .capture.patches import restore_torch as restore_torch
    from .partition import default_partition as default_partition
    from .partition import (
        min_cut_rematerialization_partition as min_cut_rematerialization_partition,
    )
    from .partition import partition as partition
    from .progress import show_progress as show_progress
    from .viewer import show as show
