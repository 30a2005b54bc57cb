"""Launch products of matrices by a few kernels, each compiled once for all graphs.

They read their matrices in place, transposed or expanded, so no view of them is made. Extents and
steps are arguments.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ...errors import CompilerError
from ...native.build import built
from . import native
from .members import plain_on_cpu, seen_through
from .tasks import Task
from .views import source_of, static_shape

aten = torch.ops.aten

#: dtype -> the C++ names of its vector and its number
DTYPES = {torch.float32: ("floats", "float"), torch.float64: ("doubles", "double")}

#: rows of a product that one task computes (BLOCK in matmul.cpp)
BLOCK = 48

#: fewest multiplications for a thread
GRAIN = 1 << 19


class Matrices(NamedTuple):
    """Matrices in a tensor: their beginning, and the steps to the next matrix, row and column."""

    start: int
    batch: int
    row: int
    column: int

    def transposed(self) -> Matrices:
        return Matrices(self.start, self.batch, self.column, self.row)


@dataclass(frozen=True)
class MatrixProduct:
    """``c[i, j]`` is the sum over ``k < deep`` of ``a[i, k] * b[k, j]``, for each of a batch."""

    memory: tuple[Node, Node, Node]
    batch: int
    rows: int
    columns: int
    deep: int
    a: Matrices
    b: Matrices
    c: Matrices

    @property
    def dtype(self) -> torch.dtype:
        return self.memory[-1].meta["val"].dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the sizes that the kernel takes."""
        return (self.rows, self.columns, self.deep, *self.a, *self.b, *self.c)

    @property
    def tasks(self) -> int:
        return self.batch * -(-self.rows // BLOCK)

    @property
    def grain(self) -> int:
        """Return how many tasks a thread should get at least."""
        return max(1, GRAIN // (min(self.rows, BLOCK) * self.columns * self.deep))

    @property
    def way(self) -> str:
        """Return the function of ``matmul.cpp`` that computes it: one row is quicker by itself,
        if neighbours in memory are columns, or are added up."""
        a, b = self.a, self.b
        if self.rows == 1 and b.column == 1:
            return "row_of"
        return "dots_of" if self.rows == a.column == b.row == 1 else "rows_of"

    def transposed(self) -> MatrixProduct:
        """Return the same product with both matrices transposed and swapped."""
        x, y, z = self.memory
        return MatrixProduct(
            (y, x, z),
            *(self.batch, self.columns, self.rows, self.deep),
            *(self.b.transposed(), self.a.transposed(), self.c.transposed()),
        )

    def in_one(self) -> MatrixProduct:
        """Return the product with batches as rows, if they are adjacent and share the factor."""
        a, c, n = self.a, self.c, self.rows
        if self.b.batch or self.batch == 1:
            return self
        if n == 1:
            a, c = a._replace(row=a.batch), c._replace(row=c.batch)
        elif (a.batch, c.batch) != (n * a.row, n * c.row):
            return self
        return replace(self, batch=1, rows=self.batch * n, a=a, c=c)


#: op -> the dimensions of its factors and its result
SPELLED = {
    aten.mm.default: ("ik", "kj", "ij"),
    aten.bmm.default: ("bik", "bkj", "bij"),
    aten.mv.default: ("ik", "k", "i"),
    aten.dot.default: ("k", "k", ""),
}

#: the rows and columns of the factors and of the result
PLANES = ("ik", "kj", "ij")


def matrix_product(n: Node) -> MatrixProduct | None:
    """Return a node as a product of matrices; None if no kernel can compute it."""
    if (
        n.target not in SPELLED
        or not n.users
        or not all(map(plain_on_cpu, (n, *n.all_input_nodes)))
        or n.meta["val"].dtype not in DTYPES
    ):
        return None
    extents, nodes, matrices = {"b": 1, "i": 1, "j": 1}, [], []
    tensors: Any = (*n.args, n)
    for tensor, dims, plane in zip(tensors, SPELLED[n.target], PLANES, strict=True):
        node, strides, start = tensor_shown(tensor)
        steps = dict.fromkeys("bijk", 0) | dict(zip(dims, strides, strict=True))
        extents |= zip(dims, static_shape(tensor), strict=True)
        nodes.append(node)
        matrices.append(Matrices(start, *[steps[k] for k in ("b", *plane)]))
    x, y, z = nodes
    sizes: Any = [extents[k] for k in "bijk"]
    p = MatrixProduct((x, y, z), *sizes, *matrices)
    if p.columns == 1:
        p = p.transposed()
    p = p.in_one()
    return p if kernel(p.dtype, p.way) else None


def product_task(p: MatrixProduct) -> Task:
    """Return the launch of a product of matrices."""
    compiled = kernel(p.dtype, p.way)
    assert compiled is not None
    return Task(compiled, p.tasks, p.sizes, p.memory, p.memory[-1:], p.grain)


def tensor_shown(n: Node) -> tuple[Node, Sequence[int], int]:
    """Return the tensor in memory that a node shows, and the node's strides and offset in it."""
    root = n
    while (source := source_of(root)) is not None:
        root = source
    if root is not n and not seen_through(root):
        val = root.meta["val"]
        base = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
        view = viewed_again(n, root, base)
        if view.untyped_storage()._cdata == base.untyped_storage()._cdata:
            return root, view.stride(), view.storage_offset()
    return n, n.meta["val"].stride(), 0


def viewed_again(n: Any, root: Node, base: Tensor) -> Any:
    """Return the views of a node applied to ``base`` in place of their root."""
    if n is root:
        return base
    source = viewed_again(n.args[0], root, base)
    return n.target(source, *n.args[1:], **n.kwargs)


@functools.cache
def kernel(dtype: torch.dtype, way: str) -> native.LoadedKernel | None:
    """Return the kernel that computes rows in this way; None if there is no compiler."""
    vector, number = DTYPES[dtype]
    parts = [(native.HERE / name).read_text() for name in ("vectors.h", "lanes.h", "matmul.cpp")]
    names = {"VECTOR": vector, "NUMBER": number, "WAY": way}
    source = "\n".join([*[f"#define {k} {v}" for k, v in names.items()], *parts])
    try:
        return native.LoadedKernel(ctypes.CDLL(str(built(source)))["aot_matmul"])
    except CompilerError:
        return None
