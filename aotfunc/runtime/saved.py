"""Programs as plain data for a file (dictionaries, lists, texts, numbers), and back.

What is read is never run as code: an op is named and looked up, and the graph is verified."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ..capture.bodies import Flow
from ..capture.custom_derivative import CustomDerivative, Later, RuleProgram
from ..capture.hooks import Hooked
from ..errors import ArgumentError, CaptureError
from ..graph import Program, verify_graph
from ..trace.emit import Builder
from ..trace.marks import fail
from ..trace.shapes.sig import Sig, make_sig
from ..transforms.lower import CALLS, lowered
from .saved_flow import flow_data, restored_flow

#: how often a derivative that applies itself is followed
DEPTH = 3
#: named values of torch's: by kind, how their names begin
NAMED = {torch.dtype: "torch.", torch.layout: "torch.", torch.memory_format: "torch."}


# ----- to data -----------------------------------------------------------------------------------


def program_data(program: Program, depth: int = 0) -> dict[str, Any]:
    """Return the program as data. Raises CaptureError for Python code and generators."""
    program = lowered(program, CALLS)
    number = {n: i for i, n in enumerate(program.graph.nodes)}
    regions: dict[Any, int] = {}

    def node(n: Node) -> dict[str, Any]:
        found: dict[str, Any] = {"name": n.name, "value": as_data(n.meta["val"], number)}
        if n.op == "call_function":
            found["call"] = target_data(n, depth)
            found["args"] = as_data(n.args, number)
            found["kwargs"] = {k: as_data(a, number) for k, a in n.kwargs.items()}
        if n.meta.get("line") is not None:
            found["line"] = str(n.meta["line"])
        found |= {k: n.meta[k] for k in ("role", "again") if n.meta.get(k) is not None}
        if n.meta.get("region") is not None:
            found["region"] = regions.setdefault(n.meta["region"], len(regions))
        return found

    return {
        "name": program.name,
        "nodes": [node(n) for n in program.graph.nodes if n.op != "output"],
        "outputs": as_data(program.outputs, number),
        "inputs": program.n_inputs,
        "results": program.n_outputs,
        "written": list(program.mutated),
    }


def target_data(n: Node, depth: int) -> Any:
    if n.target is operator.getitem:
        return "getitem"
    if isinstance(n.target, CustomDerivative):
        return derivative(n.target, depth)
    if isinstance(n.target, Flow):
        return flow_data(n.target, functools.partial(program_data, depth=depth))
    if not isinstance(n.target, OpOverload) or n.target is fail:
        where = f" (at {n.meta['line']})" if n.meta.get("line") else ""
        raise CaptureError(
            f"export: {n.target} runs Python code of this process{where}, which a file cannot "
            "hold: write it with tensor operations, or register it as an op with torch.library"
        )
    return str(n.target)


def derivative(d: CustomDerivative, depth: int) -> dict[str, Any]:
    """Return a derivative that the user wrote: the programs that were recorded of it. Its own rule
    for batches is left out, the programs are batched instead."""

    def rule(part: Any) -> Any:
        if isinstance(part, Later):
            if depth >= DEPTH:
                return {"error": f"the file holds {DEPTH} derivatives of {d.__name__}, no more"}
            part = part.part()
        if isinstance(part, RuleProgram):
            return [program_data(part.program, depth + 1), part.first, part.n_residuals]
        return {"error": str(part)} if isinstance(part, Exception) else None

    def rules(backward: Any) -> list:
        return [[have and list(have), rule(part)] for have, part in backward]

    return {
        "derivative": d.__name__,
        "hooked": isinstance(d, Hooked),
        "inputs": d.n_inputs,
        "values": as_data(d.vals, {}),
        "backward": rules(d.backward.items()),
        "forward": rule(d.forward),
        "saved": list(d.saved),
        "narrow": d.narrow and [list(d.narrow[0]), rules(d.narrow[1])],
        "unguarded": list(d.unguarded),
    }


def as_data(x: Any, number: dict[Node, int]) -> Any:
    """Return an argument or a signature as data."""
    if isinstance(x, Node):
        return {"node": number[x]}
    if isinstance(x, Sig):
        return {
            "tensor": [
                list(x.shape),
                list(x.stride),
                as_data(x.dtype, {}),
                str(x.device),
                x.offset,
            ]
        }
    if isinstance(x, tuple | list):
        items = [as_data(i, number) for i in x]
        return items if isinstance(x, list) else {"tuple": items}
    if type(x) in NAMED:
        return {"torch": str(x).removeprefix(NAMED[type(x)])}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if isinstance(x, complex):
        return {"complex": [x.real, x.imag]}
    if x is None or isinstance(x, bool | float | str):
        return x
    if isinstance(x, int):
        return int(x)
    raise CaptureError(
        f"export: a {type(x).__name__} in the graph cannot be written to a file"
        + (": draw from torch's own generator" if isinstance(x, torch.Generator) else "")
    )


# ----- from data ---------------------------------------------------------------------------------


def program_of(data: dict[str, Any]) -> Program:
    """Make the program again that :func:`program_data` turned into data. Raises ArgumentError for
    an unknown op, GraphError for a graph that is not legal."""
    b = Builder(merge=False)
    nodes: list[Node] = []
    for item in data["nodes"]:
        b.meta = {k: item[k] for k in ("line", "role", "again") if k in item}
        if "region" in item:
            b.meta["region"] = ("loaded", item["region"])
        val = from_data(item["value"], nodes)
        if "call" not in item:
            nodes.append(b.placeholder(item["name"], val))
            continue
        args, kwargs = from_data(item["args"], nodes), item["kwargs"]
        kwargs = {k: from_data(a, nodes) for k, a in kwargs.items()}
        call = function_named(item["call"])
        nodes.append(b.make("call_function", call, args, kwargs, val, name=item["name"]))
    b.meta = {}
    graph = b.finish(from_data(data["outputs"], nodes))
    verify_graph(graph, "the file")
    return Program(graph, data["inputs"], data["results"], data["written"], data["name"])


def function_named(name: Any) -> Callable:
    if name == "getitem":
        return operator.getitem
    if isinstance(name, dict):
        return restored_flow(name, program_of) if "flow" in name else restored_derivative(name)
    found: Any = torch.ops
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, OpOverload) or "from_file" in name:
        raise ArgumentError(
            f"load: there is no op {name} in this process: import the library that registers it, "
            "or load the file with the version of PyTorch that wrote it"
        )
    return found


def restored_derivative(data: dict[str, Any]) -> CustomDerivative:
    def rule(part: Any) -> Any:
        if isinstance(part, dict):
            return CaptureError(part["error"])
        return part and RuleProgram(program_of(part[0]), part[1], part[2])

    def rules(backward: list) -> tuple:
        return tuple([(have and tuple(have), rule(part)) for have, part in backward])

    narrow = data["narrow"] and (tuple(data["narrow"][0]), rules(data["narrow"][1]))
    return (Hooked if data.get("hooked") else CustomDerivative)(
        data["derivative"],
        data["inputs"],
        from_data(data["values"], []),
        rules(data["backward"]),
        rule(data["forward"]),
        tuple(data["saved"]),
        None,
        narrow,
        tuple(data["unguarded"]),
    )


def from_data(x: Any, nodes: Sequence[Node]) -> Any:
    """Undo :func:`as_data`."""
    if isinstance(x, list):
        return [from_data(i, nodes) for i in x]
    if not isinstance(x, dict):
        return x
    ((kind, of),) = x.items()
    if kind == "node":
        if not 0 <= of < len(nodes):
            raise ArgumentError(f"load: a node reads node {of}, and {len(nodes)} are there so far")
        return nodes[of]
    if kind == "tuple":
        return tuple([from_data(i, nodes) for i in of])
    if kind == "tensor":
        shape, stride, dtype, device, offset = of
        return make_sig(
            tuple(shape), tuple(stride), from_data(dtype, ()), torch.device(device), offset
        )
    if kind == "torch":
        found = getattr(torch, of, None)
        if type(found) not in NAMED:
            raise ArgumentError(f"load: torch.{of} is no dtype, layout or memory format here")
        return found
    if kind == "device":
        return torch.device(of)
    if kind == "complex":
        return complex(*of)
    raise ArgumentError(f"load: a value is a {kind}, which this version of aotfunc does not know")
