"""Choose what to save at the least cost, "bytes saved + price of what is computed again", by an
s-t minimum cut.

A value v of the forward is two nodes. The cut separates the source (not in the backward) from the
sink (in the backward):

    source -> v_in      pays for computing v again in the backward
    v_in   -> v_out     pays for saving v
    u_out  -> v_in      infinite, for each input u of v: what is computed again needs its inputs
    v_out  -> sink      infinite, for each v that the backward reads

Values cut between their two nodes are saved; values wholly on the sink's side are computed again.
A *free* value, which the forward does not need itself, has a third node, on the sink's side where
the forward does not compute v: then the backward alone does, and pays nothing.

    v_alone -> v_in     pays for computing v again, in place of the source's edge
    v_in -> v_alone     infinite: the backward computes what the forward does not
    v_alone -> u_alone  infinite, for each input u of v: what the forward computes needs its inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

INF = float("inf")
#: scipy's capacities are 32-bit integers
_MAX = int(np.iinfo(np.int32).max)


class Network:
    """The network of a joint graph, built once; only its capacities change. ``inputs[i]`` are the
    values that i is computed from, ``needed`` what the backward reads, ``free`` which values the
    backward may compute alone.

    >>> # keep the small one in the middle
    >>> costs = np.array([8, 2, 8]), np.array([INF, 1, 0])
    >>> Network([[], [0], [1]], needed=[2]).cheapest(*costs).saved.tolist()
    [False, True, False]
    """

    def __init__(
        self,
        inputs: Sequence[Sequence[int]],
        needed: Sequence[int],
        free: np.ndarray | None = None,
    ) -> None:
        from scipy.sparse import csr_array  # slow to import: only who partitions pays

        count = self.count = len(inputs)
        free = np.zeros(count, dtype=bool) if free is None else free
        self.v_in, self.source = 2 * np.arange(count), 2 * count + free.sum()
        self.sink = self.source + 1
        # where the forward computes all that it may: the source's side
        alone = self.alone = np.full(count, self.source)
        alone[free] = 2 * count + np.arange(free.sum())
        wanted = np.asarray(needed, dtype=np.int64)
        readers = np.repeat(np.arange(count), [len(p) for p in inputs])
        read = np.fromiter((p for ps in inputs for p in ps), dtype=np.int64, count=len(readers))
        early = np.stack([alone[readers], alone[read]])[:, free[read]]
        early = np.unique(early, axis=1)  # the source stands for many
        rows = [alone, self.v_in, 2 * read + 1, 2 * wanted + 1, self.v_in[free], early[0]]
        ends = [2 * readers, np.full(len(wanted), self.sink), alone[free], early[1]]
        columns = [self.v_in, self.v_in + 1, *ends]
        self.infinite = np.full(sum(map(len, ends)), _MAX, dtype=np.int32)
        places = (np.concatenate(rows), np.concatenate(columns))
        edges = 2 * count + len(self.infinite)
        shape = (self.sink + 1, self.sink + 1)
        #: which edge stands where
        self.edge = csr_array((np.arange(edges, dtype=np.int32), places), shape=shape)
        self.edge.sort_indices()

    def cheapest(self, save: np.ndarray, redo: np.ndarray) -> Cut:
        """Return the cheapest cut where nothing is known of its cost."""
        finite = save[np.isfinite(save)].sum() + redo[np.isfinite(redo)].sum()
        # a cut is known then, and nothing dearer is ever cut: the integers may be as fine as its
        # value allows
        return self.cut(save, redo, self.cut(save, redo, finite).value)

    def cut(self, save: np.ndarray, redo: np.ndarray, bound: float) -> Cut:
        """Return the cheapest cut, of several the one nearest to the inputs.

        ``bound`` is not below its cost; costs become integers in units of about 5e-10 of it.
        """
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        scale = (_MAX - 2 - 2 * self.count) / max(1.01 * bound, 1e-99)

        def integers(cost: np.ndarray) -> np.ndarray:
            return np.rint(np.minimum(cost * scale, _MAX)).astype(np.int32)

        # saving costs at least one unit, so that nothing is saved in vain
        saves, redos = np.maximum(integers(save), 1), integers(redo)
        capacities = np.concatenate([redos, saves, self.infinite])[self.edge.data]
        network = csr_array((capacities, self.edge.indices, self.edge.indptr), self.edge.shape)
        flow = maximum_flow(network, self.source, self.sink, method="dinic").flow
        residual = csr_array(network.astype(np.int64) - flow)
        residual.eliminate_zeros()
        near = np.zeros(self.sink + 1, dtype=bool)
        near[breadth_first_order(residual, self.source, return_predecessors=False)] = True
        saved, again = near[self.v_in] & ~near[self.v_in + 1], near[self.alone] & ~near[self.v_in]
        value = float(save[saved].sum() + redo[again].sum())
        return Cut(saved, again, value, max(0.0, value - 2 * self.count / scale))


class Cut(NamedTuple):
    """Which values are saved and which run on both sides, at what cost, and the least of any."""

    saved: np.ndarray
    again: np.ndarray
    value: float
    bound: float
