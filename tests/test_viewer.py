"""The page of ``show``: what it says of the programs, and, where Chromium is installed, what a
reader can do with it."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

import aotfunc
from aotfunc.viewer.layout import arranged

CHROMIUM = shutil.which("chromium")


def data_of(page):
    """The data that the page's script reads."""
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.html, re.S)
    return json.loads(text[1])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


def loss(w, x):
    return torch.tanh(x @ w).sum()


@pytest.fixture(scope="module")
def page():
    w, x = torch.randn(3, 2, requires_grad=True), torch.randn(5, 3)
    return aotfunc.show(aotfunc.jit(loss, backend="eager"), w, x, to=None)


def node(stage, name):
    return next(n for n in stage["nodes"] if n["name"] == name)


def test_stages_in_order(page):
    stages = data_of(page)["stages"]
    assert [s["made_by"] for s in stages] == [s.made_by for s in page.stages]
    assert [s["made_by"] for s in stages] == ["capture", "vjp", "forward", "backward"]


def test_what_a_node_says(page):
    tanh = node(data_of(page)["stages"][0], "tanh")
    assert (tanh["op"], tanh["kind"], tanh["type"]) == ("tanh", "pointwise", "float32[5, 2]")
    assert (tanh["bytes"], tanh["function"]) == (40, "loss")
    assert tanh["line"].endswith("in loss: return torch.tanh(x @ w).sum()")
    mm = node(data_of(page)["stages"][0], "mm")
    assert (mm["kind"], mm["flops"]) == ("product", 2 * 5 * 3 * 2)


def test_one_value_has_one_number_in_every_stage(page):
    stages = data_of(page)["stages"]
    for name in ("w", "x", "mm", "tanh"):
        assert len({node(s, name)["value"] for s in stages[:3]}) == 1, name
    # the product of the backward is another one than the forward's, whatever its name
    product = next(n for n in stages[3]["nodes"] if n["kind"] == "product")
    assert product["value"] == node(stages[1], "mm_1")["value"] != node(stages[0], "mm")["value"]
    for stage in stages:
        values = [n["value"] for n in stage["nodes"]]
        assert len(set(values)) == len(values)


def test_saved_values_are_marked_in_both_halves(page):
    forward, backward = data_of(page)["stages"][2:]
    marked = [{n["value"] for n in s["nodes"] if "mark" in n} for s in (forward, backward)]
    saved = {n["value"] for n in backward["nodes"] if n["kind"] == "input"}
    assert marked[0] == marked[1] == saved - {node(backward, "tangents_0")["value"]}


def test_recomputed_ops_are_marked():
    x = torch.randn(5, 3, requires_grad=True)
    f = aotfunc.jit(lambda x: x.sin().exp().cos().sum(), backend="eager", memory_budget=0.0)
    backward = data_of(aotfunc.show(f, x, to=None))["stages"][-1]
    assert {n["op"] for n in backward["nodes"] if n.get("mark") == "recomputed"} >= {"sin", "exp"}


def test_live_bytes_are_those_of_the_schedule(page):
    capture = data_of(page)["stages"][0]
    # a product of 40 bytes, both it and its tanh, the tanh and the sum
    assert [n["live"] for n in capture["nodes"]] == [0, 0, 40, 80, 44]


def test_groups_of_lines_and_functions(page):
    capture = data_of(page)["stages"][0]
    levels = capture["levels"]
    assert len(levels["ops"]["places"]) == 5
    assert len(levels["lines"]["places"]) == 3  # two inputs and a line
    group = levels["functions"]["group"]
    between = {(group[a], group[b]) for a, b in capture["edges"] if group[a] != group[b]}
    assert between == {(0, 2), (1, 2)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return self.inner(x) + x


def test_groups_of_modules():
    net = nn.Sequential(Block(), Block(), nn.Linear(8, 3))
    page = aotfunc.show(aotfunc.jit(net, backend="eager"), torch.randn(2, 8), to=None)
    capture, *_ = stages = data_of(page)["stages"]
    modules = {n["module"] for n in capture["nodes"]} - {""}
    assert modules == {f"{i}{part}" for i in "01" for part in ("", ".inner.0", ".inner.1")} | {"2"}
    for stage in stages:  # the parameters, too, are nodes of their own
        assert {"0", "1", "2"} <= {*stage["levels"]["outer modules"]["names"]}
        assert modules - {"0", "1"} <= {*stage["levels"]["modules"]["names"]}
        assert not {"0.inner.0"} & {*stage["levels"]["outer modules"]["names"]}


def test_a_line_knows_no_module_where_nothing_is_shown():
    made = aotfunc.make_fx(lambda x: net()(x))(torch.randn(2, 8))
    lines = [n.meta.get("line") for n in made.graph.nodes]
    assert any(lines) and not any(hasattr(line, "module") for line in lines)


def test_a_derivative_names_the_value_that_it_is_of(page):
    capture, vjp, forward, backward = data_of(page)["stages"]
    tanh, mm = node(capture, "tanh")["value"], node(capture, "mm")["value"]
    for stage in (vjp, backward):
        of = {n["op"]: n["of"] for n in stage["nodes"] if n["of"] is not None}
        assert of["tanh_backward"] == tanh and of["mm"] == mm
    assert all(n["of"] is None for s in (capture, forward) for n in s["nodes"])
    tangents = aotfunc.show(
        lambda x, t: aotfunc.jvp(torch.sin, (x,), (t,)), *torch.randn(2, 3), to=None
    )
    jvp = data_of(tangents)["stages"][1]
    assert {n["of"] for n in jvp["nodes"]} == {None, node(jvp, "sin")["value"]}


def test_groups_that_read_each_other_are_arranged():
    first, second = arranged([0, 1, 0, 1], [(0, 1), (1, 2), (2, 3)])
    assert first != second


def test_constants_and_bodies_of_a_compiled_graph():
    f = lambda x: (
        torch.linspace(0, 1, 4).cumsum(0) @ x
        + aotfunc.scan(lambda c, r: (c + r.sin(), c), x[0], x)[0]
    )
    for backend in ("eager", "cpp"):
        page = aotfunc.show(aotfunc.jit(f, backend=backend), torch.ones(4, 4), to=None)
        assert len(data_of(page)["stages"]) == len(page.stages)


@pytest.mark.parametrize("what", ["a plain function", "a module", "a saved file"])
def test_what_can_be_shown(tmp_path, what):
    x, f = torch.randn(5, 8), net()
    if what == "a plain function":
        f = f.forward
    if what == "a saved file":
        aotfunc.export(f, x).save(tmp_path / "net.aot")
        f = tmp_path / "net.aot"
    page = aotfunc.show(f, x, to=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page.html
    assert data_of(page)["stages"] and "<iframe" in page._repr_html_()


def test_text_of_the_user_cannot_end_the_script():
    def f(x):
        return x.sin() if "</script><b>" else x

    page = aotfunc.show(aotfunc.grad(f), torch.zeros(()), to=None)
    assert (
        page.html.count("</script>") == 2
        and "</script><b>" in data_of(page)["stages"][0]["nodes"][1]["line"]
    )


HELPERS = """
const found = {}, node = (i, name) =>
  columns[i].svg.querySelector(`.node[data-name="${name}"]`);
const classes = (i, name) => [...node(i, name).classList];
const click = e => e.dispatchEvent(new MouseEvent("click", { bubbles: true }));
const select = level => {
  element("level").value = level;
  element("level").dispatchEvent(new Event("change"));
};
"""

ACTIONS = """
found.columns = columns.map(c => c.stage.made_by);
click(node(0, "NAME"));
found.clicked = columns.map((c, i) => node(i, "NAME") && classes(i, "NAME"));
found.derivatives = columns.map(c =>
  [...c.svg.querySelectorAll(".derivative")].map(e => e.dataset.name));
found.kin = columns.map(c => c.svg.querySelectorAll(".kin").length);
found.details = element("details").textContent;
found.lines = columns[0].memory.querySelector(".at").getAttribute("d").match(/M/g).length;
element("search").value = "NAME";
element("search").dispatchEvent(new Event("input"));
found.hits = [element("found").textContent, document.querySelectorAll(".hit").length];
const box = document.querySelectorAll("nav input")[1];
click(box);
found.more = columns.map(c => c.stage.made_by);
select("functions");
found.edges = columns[0].svg.querySelector(".edges").getAttribute("d").match(/M/g).length;
found.groups = columns[0].svg.querySelectorAll(".node").length;
for (const listing of document.querySelectorAll("details")) listing.open = true;
const root = document.documentElement;
found.beyond = [root.scrollWidth - innerWidth, root.scrollHeight - innerHeight];
select("ops");
const start = performance.now();
for (let i = 0; i < 20; i++) { columns[0].top += 20; columns[0].draw(); }
found.frame = (performance.now() - start) / 20;
"""


def chromium(page, tmp_path, script, flag):
    """What Chromium prints of the page, in which the script has run."""
    file = tmp_path / "page.html"
    file.write_text(page.html.replace("</body>", f"<script>{{{HELPERS}{script}}}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking"
    return subprocess.run(
        [CHROMIUM, *flags.split(), "--window-size=1500,900", f"--user-data-dir={tmp_path}/profile"]
        + [flag, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def found_in_chromium(page, tmp_path, script):
    """What the script has put into ``found``."""
    result = 'document.body.innerHTML = ""; '
    result += 'make(document.body, "pre", { id: "result" }, JSON.stringify(found));'
    dom = chromium(page, tmp_path, script + result, "--dump-dom")
    return json.loads(html.unescape(re.search(r'<pre id="result">(.*)</pre>', dom, re.S)[1]))


def in_chromium(page, tmp_path, name):
    """What a reader finds who clicks on the node, searches for it, and shows another stage."""
    return found_in_chromium(page, tmp_path, ACTIONS.replace("NAME", name))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser(page, tmp_path):
    found = in_chromium(page, tmp_path, "tanh")
    assert found["columns"] == ["capture", "forward", "backward"]
    assert all("same" in names for names in found["clicked"])
    assert "saved" in found["clicked"][1] and "saved" in found["clicked"][2]
    assert found["derivatives"] == [[], [], ["tanh_backward"]]
    assert found["kin"][2] > 0  # what else came of the same line in the backward
    assert "aten.tanh.default" in found["details"] and "float32[5, 2]" in found["details"]
    assert found["lines"] == 1
    assert found["hits"][0].endswith("found") and found["hits"][1] >= 3
    assert found["more"] == ["capture", "vjp", "forward", "backward"]
    assert (found["groups"], found["edges"]) == (3, 2)


OPEN = """
const names = i => columns[i].items.map(g => g.frame ? g.name : g.members[0].name);
const middle = e => {
  const { x, y, width, height } = e.getBoundingClientRect();
  return [x + width / 2, y + height / 2];
};
const apart = (a, b) => Math.abs(a.x - b.x) >= (a.across + b.across) / 2
  || Math.abs(a.y - b.y) >= (a.down + b.down) / 2;
select("outer modules");
found.closed = columns.map((_, i) => names(i));
found.before = middle(node(0, "FIRST"));
click(node(0, "FIRST"));
found.after = middle(node(0, "1"));
found.open = columns.map((_, i) => names(i));
found.touching = columns.map(c => c.items.flatMap(a =>
  c.items.filter(b => a !== b && !apart(a, b)).map(b => [a, b])));
found.touching = found.touching.map(pairs => pairs.map(pair => pair.map(g =>
  g.frame ? g.name : g.members[0].name)));
found.details = element("details").textContent;
"""
CLOSE = """
click(node(0, "1"));
found.again = columns.map((_, i) => names(i));
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_group_is_opened_alone(tmp_path):
    f = aotfunc.jit(nn.Sequential(Block(), Block(), nn.Linear(8, 3)), backend="eager")
    page = aotfunc.show(f, torch.randn(2, 8, requires_grad=True), to=None)
    shown = [s for s in data_of(page)["stages"] if s["made_by"] != "vjp"]
    members = [[n["name"] for n in s["nodes"] if re.match(r"1\b", n["module"])] for s in shown]
    script = OPEN.replace("FIRST", members[0][0])
    found = found_in_chromium(page, tmp_path, script + CLOSE)
    assert found["again"] == found["closed"] and len(members[0]) > 1
    for closed, opened, inside, touching in zip(
        found["closed"], found["open"], members, found["touching"]
    ):  # in each stage
        assert {*opened} == {*closed, *inside, "1"}
        assert {frozenset(pair) for pair in touching} == {frozenset({"1", n}) for n in inside}
    for was, now in zip(found["before"], found["after"]):  # it opens where it stood
        assert abs(was - now) < 1
    assert f"{len(members[0]) - 3} more" in found["details"]
    shot = tmp_path / "shot.png"
    chromium(page, tmp_path, script, f"--screenshot={shot}")
    assert shot.read_bytes()[1:4] == b"PNG"


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_wide_code_does_not_scroll_the_page(tmp_path):
    page = aotfunc.show(lambda **kwargs: aotfunc.grad(wide)(kwargs), to=None, **many())
    found = in_chromium(page, tmp_path, "tensors_an_argument_with_a_long_name_0")
    assert max(map(len, page.stages[0].code.splitlines())) > 1000
    assert found["beyond"] == [0, 0]


def many():
    return {f"an_argument_with_a_long_name_{i}": torch.ones(()) for i in range(60)}


def wide(tensors):
    return sum(tensors.values()).sin()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_two_thousand_nodes_can_be_drawn(tmp_path):
    def f(x):
        for _ in range(1000):
            x = x.sin() + x
        return x.sum()

    page = aotfunc.show(aotfunc.grad(f), torch.zeros(3), to=None)
    assert len(data_of(page)["stages"][0]["nodes"]) > 2000
    found = in_chromium(page, tmp_path, "sin")
    print(found["frame"])
    assert found["hits"][0] != "0 found"
