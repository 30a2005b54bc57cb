"""Library functions and objects that tell a part of the process's state, as code may depend on."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ...trace import collector
from .description import is_plain

#: functions without arguments, by module; PyTorch versions may lack some
_TELLING: dict[Any, str] = {
    torch: "get_num_threads get_num_interop_threads get_float32_matmul_precision "
    "get_deterministic_debug_mode is_warn_always_enabled is_anomaly_enabled "
    "is_anomaly_check_nan_enabled is_deterministic_algorithms_warn_only_enabled "
    "are_deterministic_algorithms_enabled is_inference_mode_enabled is_deterministic",
    torch._C: "_get_float32_matmul_precision _get_nnpack_enabled _get_cudnn_enabled "
    "_get_cudnn_benchmark _get_cudnn_deterministic _get_cudnn_allow_tf32 _get_mkldnn_enabled "
    "_get_mkldnn_deterministic _get_cublas_allow_tf32 _get_flash_sdp_enabled "
    "_get_math_sdp_enabled _get_mem_efficient_sdp_enabled _get_cudnn_sdp_enabled",
    torch.autograd: "is_multithreading_enabled",
    torch._C._autograd: "_saved_tensors_hooks_is_enabled",
    torch.backends.cuda: "flash_sdp_enabled math_sdp_enabled mem_efficient_sdp_enabled "
    "cudnn_sdp_enabled fp16_bf16_reduction_math_sdp_allowed",
    torch.__future__: "get_overwrite_module_params_on_conversion "
    "get_swap_module_params_on_conversion",
    torch.multiprocessing: "get_sharing_strategy",
    torch.backends.mha: "get_fastpath_enabled",
    torch._tensor_str: "get_printoptions",
    sys: "getrecursionlimit getswitchinterval",
    os: "getcwd",
    np: "geterr get_printoptions",
    gc: "get_threshold isenabled",
    collector: "isenabled",  # for gc's
}
_KNOWN = {
    id(getattr(module, name))
    for module, names in _TELLING.items()
    for name in names.split()
    if hasattr(module, name)
}


def tells(x: Any) -> bool:
    """Return whether ``x`` is one of them."""
    return id(x) in _KNOWN


def has_settings(x: Any) -> bool:
    """Return whether attributes of ``x`` (``torch.backends.cudnn``) are computed by its class."""
    cls = type(x)
    return cls.__module__.startswith(("torch.backends", "torch.utils.deterministic"))


def set_attributes(x: Any, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield, by name, what an object that has settings tells."""
    for name in sorted(names):
        try:
            value = getattr(x, name)
        except Exception:  # two ways of setting one thing were mixed
            continue
        if is_plain(value) or has_settings(value):
            yield name, value
