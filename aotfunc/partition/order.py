"""Order the nodes of the early and of the late part of a joint graph.

Values are placed where they live shortest. What the early part computes only to be saved stands
right after its last input. In the late part what is computed again stands right before its first
reader, and so does what takes more memory than it frees."""

from __future__ import annotations

from .roles import Joint, ancestors


def schedule(joint: Joint, held: set[int], hosted: set[int]) -> tuple[list[int], list[int]]:
    """Return the numbers of the nodes that the early and the late part run, in order, when those
    ``held`` are handed over. Those ``hosted`` come back from the host in the late part."""
    nodes, inputs = joint.nodes, joint.inputs
    kept = ancestors(inputs, held)
    # nodes that run only to be saved follow their last input; all others stay where they are
    when = list(range(len(nodes)))
    for i in range(len(nodes)):
        if kept[i] and not joint.forward[i] and nodes[i].op != "placeholder":
            when[i] = max([when[p] for p in inputs[i]], default=i)
    early = sorted(
        [i for i in range(len(nodes)) if joint.forward[i] or kept[i]], key=lambda i: (when[i], i)
    )
    stop = [i in held for i in range(len(nodes))]
    wanted = ancestors(inputs, [i for i in joint.needed if not stop[i]], stop)
    run = [live or want for live, want in zip(joint.live, wanted, strict=True)]
    for i in hosted:
        run[i] = True
    size = [0] * len(nodes) if joint.shared else joint.layout.size
    return early, right_before(joint, places_before(joint, run, size), run, size)


def places_before(joint: Joint, run: list[bool], size: list[int]) -> list[int]:
    """Return for each node that the late part runs the one before whose run it stands: its first
    reader's for what is computed again, and for what takes more memory than it frees; the node
    itself for all others."""
    owner = joint.layout.owner
    count = len(run)
    before, last = [count] * count, [-1] * count  # of an owner's readers the last one
    for i in range(count - 1, -1, -1):
        if not run[i]:
            continue
        owners, reader = {owner[p] for p in joint.inputs[i]}, before[i]
        if joint.live[i]:
            freed = sum([size[o] for o in owners if last[o] < reader])
            grows = owner[i] != i or size[i] > freed
            if reader == count or not grows or not joint.may_run_later[i]:
                before[i] = i
        for o in owners:
            last[o] = max(last[o], before[i])
        for p in joint.inputs[i]:
            before[p] = min(before[p], before[i])
    return before


def right_before(joint: Joint, before: list[int], run: list[bool], size: list[int]) -> list[int]:
    """Return the nodes that ``run`` in order, each in the group of the node ``before`` which it
    stands. Of the inputs of a node those come first that need most memory beside their result
    (Sethi and Ullman, JACM 17, 1970)."""
    count = len(run)
    need, inputs = [0] * count, list(joint.inputs)
    for i in range(count):
        if run[i]:
            group = {p for p in joint.inputs[i] if run[p] and before[p] == before[i]}
            inputs[i] = sorted(group, key=lambda p: (size[p] - need[p], p))
            held = 0
            for p in inputs[i]:
                need[i] = max(need[i], held + need[p])
                held += size[p]
            need[i] = max(need[i], held + size[i])
    order: list[int] = []
    seen = [False] * count
    ends = [i for i in range(count) if run[i] and before[i] in (i, count)]
    for end in sorted(ends, key=lambda i: (before[i], i)):  # what no node reads is only returned
        todo = [end]
        while todo:
            i = todo[-1]
            waits = [] if seen[i] else [p for p in inputs[i] if not seen[p]]
            if waits:
                todo += reversed(waits)
                continue
            todo.pop()
            for made in (i, *joint.parts[i]):  # the parts of a tuple are made with it
                if run[made] and before[made] == before[i] and not seen[made]:
                    seen[made] = True
                    order.append(made)
    return order
