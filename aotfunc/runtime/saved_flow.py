"""Loops and branches as plain data for a file, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..capture.bodies import Flow
from ..capture.scan import Scan
from ..capture.switch import Switch
from ..capture.unwind import Unwind
from ..capture.while_loop import While
from ..errors import ArgumentError
from ..graph import Program

#: what says with its bodies what each is
FACTS = {
    "scan": ("n_consts", "n_carry", "length", "reverse", "slots"),
    "switch": (),
    "while_loop": ("n_consts", "max_steps", "slots"),
    "unwind": ("wrt",),
}


def flow_data(target: Flow, program_data: Callable[[Program], Any]) -> dict[str, Any]:
    """Return control flow as data. Policies, which are Python functions, are left out."""
    name = target.__name__
    found = {fact: getattr(target, fact) for fact in FACTS[name]}
    bodies = [program_data(body) for body in target.bodies]
    loop = target.loop if isinstance(target, Unwind) else None
    return {
        "flow": name,
        "bodies": bodies,
        "facts": {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()},
        "loop": loop and flow_data(loop, program_data),
    }


def restored_flow(data: dict[str, Any], program_of: Callable[[Any], Program]) -> Flow:
    """Undo :func:`flow_data`. Raises ArgumentError for unknown control flow."""
    bodies: Any = list(map(program_of, data["bodies"]))
    facts = data["facts"]
    match data["flow"]:
        case "scan":
            return Scan(*bodies, **facts)
        case "switch":
            return Switch(bodies)
        case "while_loop":
            return While(*bodies, **facts)
        case "unwind":
            loop: Any = restored_flow(data["loop"], program_of)
            return Unwind(loop, facts["wrt"], bodies)
    raise ArgumentError(
        f"load: there is no control flow {data['flow']} in this version of aotfunc"
    )
