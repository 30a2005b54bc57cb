"""``export`` and ``load``: a function as a file, to call and transform without its source."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.capture import argument_names, capture, parameter_names
from ..capture.makers import maker
from ..capture.tree import Arguments
from ..debug import at, user_line
from ..errors import AotfuncError, ArgumentError, CaptureError, GraphError
from ..partition import min_cut_rematerialization_partition
from ..runtime.aliasing import Changes
from ..runtime.chains import made_by
from ..runtime.compiled import Compiled
from ..runtime.execute import as_function
from ..runtime.graph_module import graph_module
from ..runtime.guards.reads import Names
from ..runtime.guards.state import State
from ..runtime.guards.stores import changed_stores, undo_changes
from ..runtime.halved import Halved, halved_programs
from ..runtime.pipeline import Compiler, Partition
from ..runtime.saved import program_data, program_of
from ..runtime.saved_state import (
    detached_copy,
    not_persistent,
    own_copy,
    set_tensor,
    state_of,
    tensor_at,
)
from ..runtime.saved_trees import TensorTable, collect, pattern, tree_of
from ..runtime.specialised import fact_text, leaf_facts
from ..trace.memory import places_of
from ..transforms.fresh import fresh
from .jit import CompiledModule
from .onnx import to_onnx

#: the version of the file's format
VERSION = 1


def export(f: Callable, *args: Any, **kwargs: Any) -> Exported:
    """Capture the function or module ``f``, for arguments like these, as a module that can be
    saved: ``export(f, x).save("f.aot")``, and ``load("f.aot")`` in another process.

    The :class:`Exported` takes arguments of the same trees, shapes, dtypes, devices and Python
    values, in any layout. It owns the tensors that ``f`` closes over, or the parameters and
    buffers of the module under their names. It holds the captured graph, and if a tensor requires
    grad the joint graph with its forward and backward half; those of a compiled function are cut
    as that one cuts them. Gradients are on; other modes (training, autocast) are the present ones.
    Raises CaptureError if ``f`` asks for values, leaves tensors outside or runs Python code at
    each call, ArgumentError for arguments or results that are neither tensors, plain values, nor
    containers and instances of these.

    >>> double = export(lambda x, scale: {"y": x * scale}, torch.ones(2), 2.0)
    >>> double(torch.arange(2.0), 2.0)
    {'y': tensor([0., 2.])}
    """
    partition: Partition = min_cut_rematerialization_partition
    compiled = f._compiled if isinstance(f, CompiledModule) else f
    if isinstance(compiled, Compiled):
        f, partition = compiled.f, compiled.pipeline.partition
    arguments = Arguments(args, kwargs, f)
    # a tensor in two places here may be two at the next call
    arguments.leaves = [detached_copy(x) if isinstance(x, Tensor) else x for x in arguments.leaves]
    inputs = [x for x in arguments.leaves if isinstance(x, Tensor)]
    given, keywords = arguments.rebuilt(arguments.leaves)
    names = [  # a keyword may have the name of a positional argument
        f"{n} (argument {i})" if n in keywords else n
        for i, n in enumerate(argument_names(f, len(args)))
    ]
    results = TensorTable([])

    def flat(*args: Any, **kwargs: Any) -> list[Tensor]:
        results.tree = pattern(f(*args, **kwargs), "the result", results)
        return results.tensors

    outside = State(f, [], [], Names())
    with torch.enable_grad():
        rec = capture(
            flat,
            arguments.leaves,
            arguments.rebuilt,
            why_not="export captures the function once for all values",
            constants=False,
            name_of=parameter_names(f, arguments),
        )
    name = getattr(f, "__name__", type(f).__name__)
    if left := [place.key for place, _ in changed_stores(outside)]:
        undo_changes(outside)
        raise CaptureError(
            f"export: {name} leaves tensors in {left[0]!r} outside{at(user_line(2))}, where "
            "what is loaded has no place for them; return them, or write to a buffer in place"
        )
    if Changes(rec):
        raise ArgumentError(
            f"export: {name} changes the shape of an argument in place{at(user_line(2))}; "
            "return the changed tensor instead"
        )
    state, used = state_of(f, rec.closed_over)
    program, made = rec.program(), made_by(rec)
    late = [
        k for k, (o, m) in enumerate(zip(program.outputs, made, strict=False)) if maker(o) != m
    ]
    places = TensorTable(inputs)
    data = {
        "version": VERSION,
        "torch": torch.__version__,
        "name": name,
        "arguments": {
            n: pattern(x, f"argument {n}", places)
            for n, x in [*zip(names, given, strict=True), *keywords.items()]
        },
        "positional": len(names),
        "results": results.tree,
        "program": program_data(fresh(program, rec.aliases, late)),
        "made": made,
        "state": used,
        "not persistent": not_persistent(f),
        "differentiated": [x.requires_grad for x in inputs],
        "halves": {},
    }
    copies: dict[int, Tensor] = {}
    exported = Exported(data, {n: copies.setdefault(id(t), own_copy(t)) for n, t in state.items()})
    exported._cut(partition)
    return exported


class Exported(nn.Module):
    """A captured function with its tensors, called as the function was; :func:`export` and
    :func:`load` return it.

    It is compiled for its ``backend`` at the first call, differentiable to any order, and may be
    transformed. Its parameters and buffers have the names of the original module, so that the
    ``state_dict`` of one fits the other. Raises ArgumentError for arguments unlike those of the
    export. Mappings among the results are dictionaries, other instances namespaces. Results that
    share memory with an argument do so here, too; those that share it only with one another do
    not.

    >>> linear = export(nn.Linear(2, 1), torch.ones(3, 2))
    >>> list(linear.state_dict()), linear(torch.ones(3, 2)).shape
    (['weight', 'bias'], torch.Size([3, 1]))
    """

    def __init__(
        self, data: dict[str, Any], state: dict[str, Tensor], backend: str | Compiler = "auto"
    ) -> None:
        super().__init__()
        self._data, self._program = data, program_of(data["program"])
        self._program.once("made", lambda: tuple(data.get("made", ())))
        self._signatures = [p.meta["val"] for p in self._program.placeholders]
        self._pipeline = Halved(data["name"], backend)
        self._pipeline.halves = {k: program_of(p) for k, p in data["halves"].items()}
        self._run = as_function(self._program, data["name"])
        self._compiled = Compiled(self._run, self._pipeline)
        for name, t in state.items():
            set_tensor(self, name, t, name not in data["not persistent"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outs = self._compiled(*self._inputs(args, kwargs, self))
        return tree_of(self._data["results"], outs)

    def _check(self) -> None:
        """Raise if the graph lacks arguments, results or tensors."""
        data, program = self._data, self._program
        if not 0 <= data["positional"] <= len(data["arguments"]):
            raise GraphError(f"load: {data['name']} takes fewer arguments than it names")
        for tree in data["arguments"].values():
            tree_of(tree, self._signatures[: program.n_inputs])
        tree_of(data["results"], program.vals)
        held = [tensor_at(self, n) for n in data["state"]]
        if program.n_inputs + len(held) != len(self._signatures):
            raise GraphError(f"load: the graph of {data['name']} takes other tensors than it has")

    def _inputs(self, args: tuple, kwargs: dict[str, Any], state: nn.Module) -> list[Tensor]:
        """Return the inputs of the program for a call, with the tensors that ``state`` holds."""
        name, wanted = self._data["name"], self._data["arguments"]
        given = {**dict(zip(wanted, args[: self._data["positional"]], strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs) or given.keys() != wanted.keys():
            raise ArgumentError(
                f"{name} takes the arguments {[*wanted]}, not {len(args)} and {[*kwargs]}"
                f"{at(user_line(2))}"
            )
        found: dict[int, tuple[str, Tensor]] = {}
        try:
            for key, data in wanted.items():
                collect(data, given[key], f"the argument {key}", found)
            inputs = [found[i] for i in range(len(found))]
            inputs += [(n, tensor_at(state, n)) for n in self._data["state"]]
            for (where, t), sig in zip(inputs, self._signatures, strict=True):
                got, wanted_facts = leaf_facts(t), (sig.shape, sig.dtype, sig.device)
                if got != wanted_facts:
                    raise ArgumentError(
                        f"{where} is {fact_text(got)}, and was exported as "
                        f"{fact_text(wanted_facts)}"
                    )
            self._check_memory(inputs)
        except ArgumentError as e:
            raise ArgumentError(
                f"{name}: {e}{at(user_line(2))}; export the function again for these"
            ) from None
        return [t for _, t in inputs]

    def _check_memory(self, inputs: Sequence[tuple[str, Tensor]]) -> None:
        """Raise ArgumentError if a write to one tensor would be seen through another one that the
        captured program reads before the write."""
        if not self._program.mutated:
            return
        groups = [place.group for place in places_of([t for _, t in inputs])]
        for i in self._program.mutated:
            for k, (where, _) in enumerate(inputs):
                if k != i and groups[k] == groups[i]:
                    raise ArgumentError(
                        f"{inputs[i][0]}, which is written to, shares memory with {where}, and "
                        "was exported as one that does not"
                    )

    def _cut(self, partition: Partition) -> None:
        """Cut the joint program, for derivatives with respect to what requires grad now."""
        state = [tensor_at(self, n) for n in self._data["state"]]
        flags = [*self._data["differentiated"], *(t.requires_grad for t in state)]
        wrt = tuple(i for i, yes in enumerate(flags) if yes)
        if wrt:
            halves = halved_programs(self._run, self._signatures, wrt, partition)
            self._pipeline.halves = halves
            self._data["halves"] = {k: program_data(p) for k, p in halves.items()}

    @property
    def graphs(self) -> dict[str, fx.GraphModule]:
        """Return its graphs, as modules to read and to run: "function", and if a tensor requires
        grad "joint", "forward" and "backward"."""
        programs = {"function": self._program, **self._pipeline.halves}
        return {name: graph_module(p, name) for name, p in programs.items()}

    def to_torch(self) -> Any:
        """Return the ``torch.export.ExportedProgram`` of the function, op by op, without
        derivatives that the user wrote. Raises the errors of ``torch.export`` for a graph that it
        refuses."""
        examples = [torch.empty_like(s.proto, device=s.device) for s in self._signatures]
        args, keywords = self._arguments(examples)
        return torch.export.export(OpByOp(self), args, keywords, strict=False)

    def to_onnx(self, **options: Any) -> Any:
        """Return the ``torch.onnx.ONNXProgram`` of the function, for ``.save("f.onnx")``: its
        inputs are the tensors among the arguments, its outputs those among the results.
        ``options`` are those of ``torch.onnx.export``: ``output_names``, ``opset_version``, ….

        Derivatives and batches are ops like others: ``export(grad(f), x).to_onnx()``. onnxruntime
        runs the model once, on random numbers and on zeros for integers, beside the function.
        Raises BackendError without onnxscript or onnxruntime, and ArgumentError for ops that
        torch.onnx cannot convert or converts to others, and for a function that writes to its
        arguments or buffers, draws random numbers, or has ``cond``, ``switch`` or ``while_loop``.
        """
        return to_onnx(self, options)

    def _arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """Return positional and keyword arguments with these tensors in their places."""
        given = {k: tree_of(tree, tensors) for k, tree in self._data["arguments"].items()}
        args = tuple(given.values())[: self._data["positional"]]
        return args, dict([*given.items()][len(args) :])

    def save(self, file: str | Path) -> None:
        """Write the function to a file, with the present values of its tensors."""
        first: dict[int, str] = {}
        names = {
            name: [first.setdefault(id(t), name), isinstance(t, nn.Parameter), t.requires_grad]
            for name, t in state_of(self, ())[0].items()
        }
        tensors = io.BytesIO()
        torch.save({n: tensor_at(self, n).detach() for n in first.values()}, tensors)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("program.json", json.dumps({**self._data, "tensors": names}))
            z.writestr("tensors.pt", tensors.getvalue())

    def __reduce__(self) -> Any:
        return Exported, (self._data, state_of(self, ())[0], self._pipeline.compilers[0])

    def __repr__(self) -> str:
        return f"<exported {self._data['name']}: {self._program.signature}>"


class OpByOp(nn.Module):
    """An :class:`Exported` that calls its ops one by one, for tracers that watch."""

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self._exported, self._graph = [exported], exported.graphs["function"]
        for name, t in state_of(exported, ())[0].items():
            set_tensor(self, name, t)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (exported,) = self._exported
        tensors = exported._inputs(args, kwargs, self)
        outs = self._graph(*tensors)
        program = exported._program
        for index, new in zip(program.mutated, outs[program.n_outputs :], strict=True):
            tensors[index].copy_(new)
        return tree_of(exported._data["results"], outs)


def load(file: str | Path, backend: str | Compiler = "auto") -> Exported:
    """Read the function that :meth:`Exported.save` wrote to a file, to be compiled by ``backend``.

    Nothing in the file is run as code, and its tensors are read with ``weights_only``. Raises
    ArgumentError for a file that is none of ours, damaged or of another format, and for an op that
    is not registered in this process; GraphError for a graph that is not legal.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     export(torch.sin, torch.ones(2)).save(f"{folder}/sin.aot")
    ...     sin = load(f"{folder}/sin.aot")
    >>> grad(lambda x: sin(x).sum())(torch.zeros(2))
    tensor([1., 1.])
    """
    try:
        with zipfile.ZipFile(file) as z:
            data, raw = json.loads(z.read("program.json")), z.read("tensors.pt")
    except (zipfile.BadZipFile, KeyError, ValueError) as e:
        raise ArgumentError(f"load: {file} is not a file that export wrote ({e})") from e
    try:
        if data["version"] != VERSION:
            raise ArgumentError(
                f"load: {file} has the format {data['version']}, and this version of aotfunc "
                f"reads {VERSION}: export the function again"
            )
        tensors = torch.load(io.BytesIO(raw), weights_only=True)
        state: dict[str, Tensor] = {}
        for name, (first, parameter, grad) in data["tensors"].items():
            t = state.get(first, tensors[first])
            kind = nn.Parameter(t, grad) if parameter and first == name else t.requires_grad_(grad)
            state[name] = kind
        exported = Exported(data, state, backend)
        exported._check()
        return exported
    except AotfuncError:
        raise
    except Exception as e:
        raise ArgumentError(f"load: {file} cannot be read here ({type(e).__name__}: {e})") from e
