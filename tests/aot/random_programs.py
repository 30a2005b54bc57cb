"""Random programs around a compiled function: what it computes, and what happens between its
calls.

A program is drawn by running it in eager mode: a statement is a template of one of the tables of
:mod:`.random_statements`, its holes filled with names that exist by then; one that eager mode
refuses is not taken. The text defines ``program(compiled, see)``: ``compiled`` is what wraps the
function and those that it calls, ``see()`` is where the variables are to be looked at."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Set

import torch
from torch import Tensor, nn

from .program_text import Block, Line, render
from .random_statements import (
    ALIASES,
    ARGUMENTS,
    ATTRIBUTES,
    AUTOCAST,
    BETWEEN,
    BODY,
    CALLS,
    DERIVATIVES,
    HEADER,
    LIBRARY,
    OUTSIDE,
    REGIONS,
    SECOND,
    SIGNATURES,
    Table,
)


def plain(f: Callable) -> Callable:
    """What ``compiled`` is in eager mode; what it returns is never a module."""
    return (lambda *args, **kwargs: f(*args, **kwargs)) if isinstance(f, nn.Module) else f


def is_leaf(t: Tensor) -> bool | None:
    """None where autograd refuses to say: a view made under no_grad of what was written to
    since."""
    try:
        return t.is_leaf
    except RuntimeError:
        return None


class Scope:
    """What a statement may name, and the values that the names have where the program is drawn."""

    def __init__(
        self, draw: random.Random, env: dict, numbers: Iterator[int], names=(), outside=()
    ) -> None:
        self.draw, self.env, self.numbers = draw, env, numbers
        self.names: list[str] = list(names)  # expressions for tensors; the latest are drawn most
        self.same = self.made = ""  # the tensor that was named last, and the new one
        self.outside: list[str] = list(outside)  # expressions for whatever lies outside

    # ----- what can be named ---------------------------------------------------------------------

    def value(self, expression: str):
        return eval(expression, self.env)

    def of_kind(self, kind: type, expressions: list[str]) -> list[str]:
        """Those of the expressions that have such a value now."""
        found = []
        for e in expressions:
            try:
                value = self.value(e)
            except Exception:
                continue
            if isinstance(value, kind) and not (kind is float and isinstance(value, bool)):
                found.append(e)
        return found

    def tensor(self, outside: float = 0.15, floating: bool | None = True) -> str:
        mine, theirs = (
            [
                e
                for e in self.of_kind(Tensor, es)
                if floating in (None, self.value(e).is_floating_point())
            ]
            # eager derivatives of what read the statistics are of those that are there by then: a
            # normalisation updates them and does not say so
            for es in (
                self.names,
                [e for e in self.outside if not e.endswith(("running_mean", "running_var"))],
            )
        )
        if theirs and (not mine or self.draw.random() < outside):
            return self.draw.choice(theirs)
        return self.draw.choice(mine[-3:] if self.draw.random() < 0.6 else mine)

    def operand(self, what: str) -> str:
        match what:
            case "local":
                return self.draw.choice(
                    [n for n in self.of_kind(Tensor, self.names) if n.isidentifier()]
                )
            case "int" | "any":
                return self.tensor(floating=None if what == "any" else False)
        return self.tensor(outside=0.4 if what == "y" else 0.15)

    def hole(self, what: str) -> str:
        """A name or value for a hole of a template. Raises IndexError if there is none."""
        choice = self.draw.choice
        match what:
            case "new":
                self.made = f"v{next(self.numbers)}"
                return self.made
            case "made":
                return self.made
            case "x" | "y" | "any" | "int" | "local":
                self.same = self.operand(what)
                return self.same
            case "same":
                return self.same
            case "state":
                return choice(
                    [
                        n
                        for n in self.of_kind(Tensor, self.outside)
                        if not self.value(n).requires_grad
                    ]
                )
            case "module":
                return choice(self.of_kind(nn.Module, self.outside))
            case "inner":
                return choice([n for n in self.outside if n in ("inner", "inner2", "fast", "bn")])
            case "number":
                return choice([*self.of_kind(float, self.outside), "0.5"])
            case "flag":
                return choice([*self.of_kind(bool, self.outside), "True", "False"])
            case "dim":
                return choice(["0", "-1"])
        raise KeyError(what)

    # ----- statements ----------------------------------------------------------------------------

    def fill(self, template: str) -> str:
        """The template with its holes filled."""
        text = re.sub(r"(?<!\{)\{(\w[\w ]*)\}(?!\})", lambda m: self.hole(m[1]), template)
        return text.replace("{{", "{").replace("}}", "}")

    def take(self, text: str) -> bool:
        """Run a statement; whether it went well."""
        try:
            exec(text, self.env)
        except Exception:
            return False
        new = [n for n in dict.fromkeys(re.findall(r"\bv\d+\b", text)) if n not in self.names]
        tensors = [n for n in new if isinstance(self.env.get(n), Tensor)]
        self.names += tensors
        return all(small(self.env[n]) for n in tensors)

    def statement(self, table: Table, around: str = "") -> str | None:
        """A statement of the table that runs (inside of ``around``)."""
        for _ in range(8):
            kind = self.draw.choices(list(table), [weight for weight, _ in table.values()])[0]
            try:
                text = self.fill(self.draw.choice(table[kind][1]))
            except IndexError:
                continue
            if self.take(render([Block(around, [text])]) if around else text):
                return text
        return None

    def statements(self, table: Table, count: int, regions: list[str]) -> list[Line]:
        """Statements, some of them in regions and checkpoints."""
        lines: list[Line] = []
        for _ in range(count):
            r = self.draw.random()
            if r < 0.1:
                head = self.fill(self.draw.choice(regions))
                inside = [self.statement(table, head) for _ in range(self.draw.randrange(1, 4))]
                if body := [text for text in inside if text is not None]:
                    lines.append(Block(head, list(body)))
            elif r < 0.14:
                lines += self.checkpointed(table)
            elif (text := self.statement(table)) is not None:
                lines.append(text)
        return lines

    def checkpointed(self, table: Table) -> list[Line]:
        """A function of its own, called under a checkpoint."""
        number = next(self.numbers)
        name, t = f"part{number}", f"t{number}"
        try:
            x, reentrant = self.tensor(), self.draw.choice([True, False])
            # a reentrant one runs on leaves when gradients are computed, and autograd then refuses
            # to write to them
            if not self.take(
                f"{t} = {x}.detach().requires_grad_({x}.requires_grad)"
                if reentrant
                else f"{t} = {x} * 1"
            ):
                return []
            inner = Scope(self.draw, self.env, self.numbers, [t], self.outside)
            # what it writes outside is written again when it is computed again
            table = {
                kind: table[kind]
                for kind in ("compute", "view", "random", "custom", "write")
                if kind in table
            }
            if reentrant:  # what it returns undifferentiated requires grad all the same
                table = {kind: table[kind] for kind in ("compute", "random") if kind in table}
            body = [text for _ in range(3) if (text := inner.statement(table)) is not None]
            block = Block(
                f"def {name}({t}):", [*body, f"return {inner.tensor(outside=0)}.clone()"]
            )
            text = self.fill(f"{{new}} = checkpoint({name}, {x}, use_reentrant={reentrant})")
        except IndexError:
            return []
        for mine in inner.names:  # its own
            self.env.pop(mine, None)
        return [block, text] if self.take(render([block])) and self.take(text) else []


def small(t: Tensor) -> bool:
    return t.numel() <= 64 and bool((t.detach().double().abs() < 1e4).all())


class Driver(Scope):
    """The statements around the calls."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.spent: list[str] = []  # results that are not to be differentiated any more

    def spend(self) -> None:
        self.spent = [n for n in self.env if n.startswith("out")]

    def hole(self, what: str) -> str:
        choice, env = self.draw.choice, self.env
        modules = {n: v for n, v in env.items() if isinstance(v, nn.Module) and n != "self"}
        params = [n for n, v in env.items() if isinstance(v, Tensor) and is_leaf(v) and n != "x"]
        theirs = [
            f"{n}.{p}" for n, m in modules.items() for p, _ in m.named_parameters() if "." not in p
        ]
        match what:
            case "arg" | "other":
                return choice([n for n in "xyz" if n in env])
            case "m":
                children = [
                    f"{n}.{c}"
                    for n, m in modules.items()
                    for c, _ in m.named_children()
                    if c.isidentifier()
                ]
                return choice([*modules, *children])
            case "lin":
                return choice([n for n in ("lin", "m.lin") if n.split(".")[0] in env])
            case "param":
                self.same = choice(params * (self.draw.random() < 0.3) + theirs)
                return self.same
            case "leaf":
                names = [n for n in [*params, *theirs, "x"] if n in env and is_leaf(self.value(n))]
                return choice([n for n in names if self.value(n).requires_grad])
            case "outs" | "any outs":
                recent = [n for n in env if n.startswith("out")][-2:]
                return choice([n for n in recent if what == "any outs" or n not in self.spent])
            case "out" | "result":
                outs = self.hole("outs" if what == "out" else "any outs")
                single = isinstance(env[outs], Tensor)
                self.same = outs if single else f"{outs}[{self.draw.randrange(len(env[outs]))}]"
                return self.same
            case (
                "unwritten out"
            ):  # a view from before a write does not learn at once that its base requires grad
                out = self.hole("out")
                return choice([out] * (self.value(out)._version == 0))
        return super().hole(what)


class Drawing:
    """The program of a seed, while it is drawn; ``off`` are the kinds of statements that are left
    out."""

    def __init__(self, seed: int, off: Set[str]) -> None:
        self.draw, self.off = random.Random(seed), off
        self.numbers = iter(range(10_000))
        self.env: dict = {"compiled": plain, "see": lambda: None}
        self.single = self.draw.random() < 0.15  # float32: autocast acts on it
        self.setup: list[Line] = [f"torch.manual_seed({seed})"]
        self.setup.append(f"torch.set_default_dtype(torch.float{32 if self.single else 64})")
        self.body = {k: v for k, v in BODY.items() if k not in off}
        self.between = {k: v for k, v in BETWEEN.items() if k not in off}
        self.regions = REGIONS + AUTOCAST * (self.single and "autocast" not in off)
        exec("\n".join([HEADER, *LIBRARY.values(), *map(str, self.setup)]), self.env)

    def whole(self) -> list[Line]:
        classes = [self.module()] if self.draw.random() < 0.5 else []
        self.closures()
        signature, args = self.arguments()
        f = self.function(signature, args)
        names = [n for n in self.outside if n.isidentifier() and self.draw.random() < 0.3]
        scope = [f"global {', '.join(names)}"] if names else []
        main = [
            *scope,
            *self.setup,
            f,
            "f = compiled(f)",
            "see()",
            *self.calls(args, render([*classes, f])),
        ]
        return [*classes, Block("def program(compiled, see):", main)]

    def module(self) -> Block:
        """A class of modules."""
        draw, env = self.draw, self.env
        lines = [
            "super().__init__()",
            ATTRIBUTES[0],
            *draw.sample(ATTRIBUTES[1:], draw.randrange(1, 6)),
        ]
        init = Block("def __init__(self):", list(lines))
        exec(render([Block("class Net(nn.Module):", [init])]), env)
        env["self"], env["a"] = env["Net"](), torch.randn(2, 3)
        s = Scope(draw, env, self.numbers, ["a"], attributes_of("self", env["self"]))
        body = s.statements(self.body, draw.randrange(1, 6), self.regions)
        forward = Block("def forward(self, a):", [*body, f"return {s.tensor(outside=0)}"])
        block = Block("class Net(nn.Module):", [init, forward])
        exec(render([block]), env)
        return block

    def closures(self) -> None:
        """What the function closes over."""
        draw, env, before = self.draw, self.env, set(self.env)
        s = Scope(draw, env, self.numbers)
        texts = sorted(draw.sample(OUTSIDE, draw.randrange(2, 9)), key=OUTSIDE.index)
        texts += ["m = Net()", "fast = compiled(m)"][: 1 if draw.random() < 0.7 else 2]
        self.setup += [
            t for t in texts if not ("nested" in self.off and "compiled" in t) and s.take(t)
        ]
        self.outside = [n for n in env if n not in before]
        modules = [n for n in self.outside if isinstance(env[n], nn.Module)]
        params = [f"*{n}.parameters()" for n in modules] + ["w"] * ("w" in env)
        text = f"opt = torch.optim.{draw.choice(['SGD', 'Adam'])}([{', '.join(params)}], lr=0.1)"
        if params and s.take(text):
            self.setup.append(text)
        self.outside += [a for n in modules for a in attributes_of(n, env[n])]

    def arguments(self) -> tuple[str, str]:
        """The function's parameters, and what is passed for them."""
        s = Driver(self.draw, self.env, self.numbers)
        signature, args = self.draw.choice(
            [pair for pair in SIGNATURES if pair[1] != "x, m" or "m" in self.env]
        )
        for name in re.findall(r"\b[nxyz]\b", args):
            if name in self.env:
                continue
            self.env[name] = None
            text = "n = 2"
            while name != "n":
                table = ARGUMENTS if name == "x" or self.draw.random() < 0.6 else ALIASES
                text = self.draw.choice(table).replace("{arg}", name).replace("{other}", "x")
                if s.take(text):
                    break
            s.take(text)
            self.setup.append(text)
        return signature, args

    def function(self, signature: str, args: str) -> Block:
        inside = dict(self.env)
        exec(f"def bound({signature}): return locals()", inside)
        bound = eval(f"bound({args})", inside)
        names = []
        for name, value in bound.items():
            inside[name] = value
            if isinstance(value, Tensor):
                inside[name] = value * 1 if value.requires_grad else value.clone()
                names.append(name)
            elif isinstance(value, tuple | dict):
                names += [
                    f"{name}[{k!r}]"
                    for k in (value if isinstance(value, dict) else range(len(value)))
                ]
        s = Scope(self.draw, inside, self.numbers, names, [*self.outside, *["n"] * ("n" in bound)])
        body = s.statements(self.body, self.draw.randrange(3, 12), self.regions)
        block = Block(f"def f({signature}):", [*body, self.returned(s)])
        exec(render([block]), self.env)
        return block

    def returned(self, s: Scope) -> str:
        """A return statement."""
        views = ["", "", "", ".detach()", "[0]"] + ["[:]", ".view(-1)"] * (
            "no-op view" not in self.off
        )
        results = [
            s.tensor(0.1, None) + self.draw.choice(views)
            for _ in range(self.draw.choice([1, 1, 2, 3]))
        ]
        comma = "," if len(results) == 1 and self.draw.random() < 0.3 else ""
        return f"return {', '.join(results)}{comma}"

    def calls(self, args: str, text_of_f: str) -> list[Line]:
        """The calls and what happens between them."""
        s, draw = Driver(self.draw, self.env, self.numbers), self.draw
        lines: list[Line] = []
        table = (
            CALLS
            + [f"with torch.autocast('cpu', torch.bfloat16):\n    {CALLS[0]}"] * 4 * self.single
        )
        table = [c for c in table if not any(word in c for word in self.off)]
        # eager leaves out what a reentrant checkpoint closes over, for some sets of inputs
        reentrant = "use_reentrant=True" in text_of_f
        derivatives = [d for d in DERIVATIVES if not (reentrant and "{leaf}" in d)]
        if re.search(
            r"_\(|\[.*\] = |[-+*/]= |out=|inplace|norm|bn|backward\(|step\(", text_of_f
        ):  # would be written again
            table = [c for c in table if "checkpoint" not in c]
        for k in range(draw.randrange(2, 5)):
            if k:
                texts = [
                    text
                    for _ in range(draw.randrange(4))
                    if (text := s.statement(self.between)) is not None
                ]
                lines += [*texts, "see()"]
                if any(
                    ".data" in text for text in texts
                ):  # eager derivatives are those of the new data
                    s.spend()
            text = draw.choice(table).replace("{outs}", f"out{k}").replace("{args}", args)
            if not s.take(text):
                continue
            lines += [text, "see()"]
            if draw.random() < 0.65:
                # of second derivatives eager adds some in bfloat16 that are added in the wider
                # dtype here
                second = (
                    draw.random() < 0.15
                    and "second order" not in self.off
                    and "bfloat16" not in text_of_f
                    and not reentrant
                )
                for form in SECOND if second else [draw.choice(derivatives)]:
                    try:
                        text = s.fill(form)
                    except IndexError:
                        break
                    if not s.take(text):
                        break
                    lines += [text, "see()"]
                    if "_graph" not in text:  # more of a freed graph may be left in eager mode
                        s.spend()
        return lines


def attributes_of(name: str, m: nn.Module) -> list[str]:
    """Expressions for what a module holds."""
    state = m.__dict__
    own = [n for n, v in state.items() if isinstance(v, float | Tensor) or n == "on"]
    names = [*state["_parameters"], *state["_buffers"], *state["_modules"], *own]
    return [f"{name}.{n}" for n in names if n.isidentifier()]


def drawn(seed: int, off: Set[str] = frozenset()) -> list[Line]:
    """The program of this seed, without the kinds of statements that are switched off."""
    dtype = torch.get_default_dtype()
    try:
        return Drawing(seed, off).whole()
    finally:
        torch.set_default_dtype(dtype)
