"""Cut a joint graph into a forward and a backward: what to save, what to compute again."""

from ..errors import PartitionError
from .budget import Bytes, Peak, Time
from .cost import Cost, Flops, Roofline, nbytes
from .partitions import (
    Partition,
    default_partition,
    min_cut_rematerialization_partition,
    partition,
)
from .policies import (
    Policy,
    Verdict,
    both,
    either,
    everything_saveable,
    must_recompute,
    must_save,
    names,
    nothing_saveable,
    offload,
    save_any_but_these,
    save_dots,
    save_dots_no_batch,
    save_only_these,
)
from .profile import Profiled
from .report import Recomputed, Report, Residual, residuals, table
from .verify import verify

__all__ = [
    "Bytes",
    "Cost",
    "Flops",
    "Partition",
    "PartitionError",
    "Peak",
    "Policy",
    "Profiled",
    "Recomputed",
    "Report",
    "Residual",
    "Roofline",
    "Time",
    "Verdict",
    "both",
    "default_partition",
    "either",
    "everything_saveable",
    "min_cut_rematerialization_partition",
    "must_recompute",
    "must_save",
    "names",
    "nbytes",
    "nothing_saveable",
    "offload",
    "partition",
    "residuals",
    "save_any_but_these",
    "save_dots",
    "save_dots_no_batch",
    "save_only_these",
    "table",
    "verify",
]
