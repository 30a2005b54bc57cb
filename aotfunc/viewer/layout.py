"""Place the nodes of a graph: in layers, with few crossings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import AotfuncError

#: edges across more layers than this do not count in the arrangement
FAR = 12


def arranged(group: Sequence[int], edges: Iterable[tuple[int, int]]) -> list[tuple[float, int]]:
    """Return the place of each group of nodes, in columns and rows.

    ``group`` has the number of the group of each node. Raises AotfuncError where igraph is not
    installed. Source: Sugiyama, Tagawa and Toda, Methods for visual understanding of hierarchical
    system structures (1981), in igraph.

    >>> arranged([0, 1, 1], [(0, 1), (1, 2)])
    [(0.0, 0), (0.0, 1)]
    """
    try:
        import igraph
    except ImportError as e:
        raise AotfuncError(
            "show arranges graphs with igraph, which is not installed; pip install 'aotfunc[show]'"
        ) from e
    between = sorted({(group[a], group[b]) for a, b in edges if group[a] != group[b]})
    count = max(group, default=-1) + 1
    graph = igraph.Graph(count, between, directed=True)
    graph.delete_edges(graph.feedback_arc_set(method="eades"))  # groups may be read in circles
    layer, order = [0] * count, graph.topological_sorting()
    for i in order:
        layer[i] = max([layer[j] + 1 for j in graph.predecessors(i)], default=0)
    for i in reversed(order):  # a node stands above its first reader, inputs too
        layer[i] = min([layer[j] - 1 for j in graph.successors(i)], default=layer[i])
    # an edge is a node more in each layer that it crosses; long ones would be nearly all of them
    graph.delete_edges([e for e in graph.es if layer[e.target] - layer[e.source] > FAR])
    layout = graph.layout_sugiyama(layers=layer, maxiter=100)
    places, free = [(0.0, 0)] * count, dict.fromkeys(layer, -float("inf"))
    for x, i in sorted((layout[i][0], i) for i in range(count)):
        x = max(x, free[layer[i]])  # it may put two nodes half a column apart
        places[i], free[layer[i]] = (x, layer[i]), x + 1
    return places
