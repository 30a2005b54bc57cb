"""Joint graph -> forward graph + backward graph: what to save, what to compute again."""

from .cost import Cost, Roofline, nbytes
from .policy import default_partition, min_cut_rematerialization_partition
from .report import Residual, residuals, table
from .roles import PartitionError
from .verify import verify

__all__ = [
    "Cost",
    "PartitionError",
    "Residual",
    "Roofline",
    "default_partition",
    "min_cut_rematerialization_partition",
    "nbytes",
    "residuals",
    "table",
    "verify",
]
