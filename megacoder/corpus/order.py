"""Algorithm 1 of DeepSeek-Coder (arXiv 2401.14196): files in the order of their dependencies.

Weakly connected subgraphs are ordered one by one: of the files not yet placed, the one with the fewest dependencies
not yet placed comes next. Taking the fewest, rather than requiring none, is also how import cycles are handled. The
paper leaves ties open; here the lowest index wins, and indices follow paths, so the order depends on nothing else. The
paper's search for the minimum is quadratic; a heap with stale entries makes it O((V + E) log V).
"""

import heapq
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

__all__ = ["connected_subgraphs", "dependency_order"]


def connected_subgraphs(depends_on: Sequence[AbstractSet[int]]) -> list[list[int]]:
    """Weakly connected components of the graph, each sorted, in the order of their lowest members."""
    parent = list(range(len(depends_on)))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node, dependencies in enumerate(depends_on):
        for dependency in dependencies:
            low, high = sorted((find(node), find(dependency)))
            parent[high] = low
    components: dict[int, list[int]] = {}
    for node in range(len(depends_on)):
        components.setdefault(find(node), []).append(node)
    return list(components.values())


def dependency_order(nodes: Sequence[int], depends_on: Sequence[AbstractSet[int]]) -> list[int]:
    """One subgraph's nodes, dependencies before dependants as far as cycles allow.

    `depends_on[a]` holds b where a depends on b; a self-dependency is ignored.
    """
    dependants: dict[int, list[int]] = {node: [] for node in nodes}
    in_degree = dict.fromkeys(nodes, 0)
    for node in nodes:
        for dependency in depends_on[node]:
            if dependency != node:
                dependants[dependency].append(node)
                in_degree[node] += 1
    heap = [(degree, node) for node, degree in in_degree.items()]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        degree, node = heapq.heappop(heap)
        if in_degree.get(node) != degree:
            continue  # stale: placed, or pushed again with a lower degree
        del in_degree[node]
        order.append(node)
        for dependant in dependants[node]:
            if dependant in in_degree:
                in_degree[dependant] -= 1
                heapq.heappush(heap, (in_degree[dependant], dependant))
    return order
