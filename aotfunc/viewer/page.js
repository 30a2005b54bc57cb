"use strict";
// One column for each stage that is shown. A graph draws only the nodes that are in sight, so that
// thousands stay smooth.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 150, HEIGHT = 34, ACROSS = 165, DOWN = 66;
const state = { level: "ops", pointed: null, kept: null, query: "" };
const element = id => document.getElementById(id);

function make(parent, tag, attributes = {}, text = "") {
  const e = parent.namespaceURI === SVG || tag === "svg"
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) e.setAttribute(name, value);
  if (text) e.textContent = text;
  parent.append(e);
  return e;
}

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (n < 1024) return `${+n.toFixed(1)} ${unit}`;
    n /= 1024;
  }
  return `${+n.toFixed(1)} GiB`;
}

class Column {
  constructor(stage) {
    this.stage = stage;
    this.section = make(element("columns"), "section");
    const most = Math.max(0, ...stage.nodes.map(n => n.live));
    const title = make(this.section, "h2", {}, stage.made_by + " ");
    make(title, "small", {}, `${stage.size} ops, ${bytes(most)} at most`);
    this.svg = make(this.section, "svg", { class: "graph" });
    this.memory = make(this.section, "svg", { class: "memory", preserveAspectRatio: "none" });
    const listing = make(this.section, "details");
    make(listing, "summary", {}, "code");
    make(listing, "pre", {}, stage.code);
    this.listen();
  }

  // The groups of the level: their members, and where they stand.
  arrange() {
    const { group, places, edges } = this.stage.levels[state.level];
    this.groups = places.map(([x, y]) => ({ x: x * ACROSS, y: y * DOWN, members: [] }));
    group.forEach((g, i) => this.groups[g].members.push(this.stage.nodes[i]));
    this.group = group;
    this.edges = edges;
    const xs = this.groups.map(g => g.x), ys = this.groups.map(g => g.y);
    const size = this.svg.getBoundingClientRect();
    const wide = Math.max(...xs) - Math.min(...xs) + 2 * WIDTH;
    this.scale = Math.max(0.55, Math.min(1, size.width / wide));
    const first = Math.min(...ys) + 10 * DOWN;
    const top = xs.filter((_, i) => ys[i] < first).sort((a, b) => a - b);
    this.left = top[top.length >> 1] - size.width / this.scale / 2;
    this.top = Math.min(...ys) - HEIGHT;
    this.draw();
  }

  listen() {
    let from = null;
    const at = e => e.target.closest(".node")?.dataset.group;
    this.svg.addEventListener("pointerdown", e => { from = [e.clientX, e.clientY, this.left, this.top]; });
    window.addEventListener("pointerup", () => { from = null; });
    this.svg.addEventListener("pointermove", e => {
      if (from) {
        this.left = from[2] - (e.clientX - from[0]) / this.scale;
        this.top = from[3] - (e.clientY - from[1]) / this.scale;
        this.later();
      } else if (!state.kept) {
        point(at(e) === undefined ? null : { column: this, group: +at(e) });
      }
    });
    this.svg.addEventListener("click", e => {
      state.kept = at(e) === undefined ? null : { column: this, group: +at(e) };
      point(state.kept);
    });
    this.svg.addEventListener("wheel", e => {
      e.preventDefault();
      const box = this.svg.getBoundingClientRect();
      const x = e.clientX - box.left, y = e.clientY - box.top;
      const scale = Math.min(3, Math.max(0.02, this.scale * Math.exp(-e.deltaY / 500)));
      this.left += x / this.scale - x / scale;
      this.top += y / this.scale - y / scale;
      this.scale = scale;
      this.later();
    }, { passive: false });
  }

  later() {
    if (!this.waiting) this.waiting = requestAnimationFrame(() => { this.waiting = 0; this.draw(); });
  }

  show(group) {
    const { x, y } = this.groups[group], size = this.svg.getBoundingClientRect();
    this.scale = Math.max(this.scale, 0.7);
    this.left = x - size.width / this.scale / 2;
    this.top = y - size.height / this.scale / 2;
    this.draw();
  }

  draw() {
    const size = this.svg.getBoundingClientRect();
    const right = this.left + size.width / this.scale, bottom = this.top + size.height / this.scale;
    const seen = g => g.x > this.left - WIDTH && g.x < right + WIDTH
      && g.y > this.top - HEIGHT && g.y < bottom + HEIGHT;
    this.svg.replaceChildren();
    const all = make(this.svg, "g", {
      transform: `scale(${this.scale}) translate(${-this.left} ${-this.top})` });
    const marks = marked();
    const near = g => g.members.some(n => marks.same.has(n.value));
    const paths = { edges: "", near: "" };
    for (const [a, b] of this.edges) {
      const from = this.groups[a], to = this.groups[b];
      if (Math.max(from.y, to.y) < this.top || Math.min(from.y, to.y) > bottom) continue;
      const y1 = from.y + HEIGHT / 2, y2 = to.y - HEIGHT / 2, middle = (y1 + y2) / 2;
      paths[near(from) || near(to) ? "near" : "edges"] +=
        `M${from.x} ${y1}C${from.x} ${middle} ${to.x} ${middle} ${to.x} ${y2}`;
    }
    for (const [name, d] of Object.entries(paths)) if (d) make(all, "path", { class: name, d });
    this.groups.forEach((g, i) => { if (seen(g)) this.node(all, g, i, marks, near(g)); });
    this.curve(marks);
  }

  node(parent, g, i, marks, same) {
    const first = g.members[0], one = g.members.length === 1;
    const has = test => g.members.some(test);
    const names = ["node", one ? first.kind : "other"];
    if (has(n => n.mark === "saved")) names.push("saved");
    if (has(n => n.mark === "recomputed")) names.push("recomputed");
    if (has(n => n.result)) names.push("result");
    if (same) names.push("same");
    else if (has(n => marks.same.has(n.of) || marks.of.has(n.value))) names.push("derivative");
    else if (has(n => marks.lines.has(n.line))) names.push("kin");
    if (has(n => matches(n))) names.push("hit");
    const e = make(parent, "g", {
      class: names.join(" "), "data-group": i, "data-name": first.name,
      transform: `translate(${g.x} ${g.y})` });
    make(e, "rect", { x: -WIDTH / 2, y: -HEIGHT / 2, width: WIDTH, height: HEIGHT });
    if (this.scale < 0.3) return;
    const short = (text, n) => text.length > n ? text.slice(0, n - 1) + "…" : text;
    const label = one ? (first.kind === "input" ? first.name : first.op)
      : this.stage.levels[state.level].names[i].replace(/^.*?: /, "");
    const under = one ? first.type : `${g.members.length} ops`;
    make(e, "text", { y: -2 }, short(label || first.name, 24));
    make(e, "text", { y: 11, class: "type" }, short(under, 30));
  }

  // The memory that lives while each op runs, and where the pointed ops run.
  curve(marks) {
    const nodes = this.stage.nodes, most = Math.max(1, ...nodes.map(n => n.live));
    this.memory.setAttribute("viewBox", `0 0 ${Math.max(1, nodes.length)} 56`);
    this.memory.replaceChildren();
    const y = n => 54 - 42 * n.live / most;
    make(this.memory, "path", { "vector-effect": "non-scaling-stroke",
      d: "M0 54" + nodes.map((n, i) => `L${i} ${y(n)}L${i + 1} ${y(n)}`).join("") + `L${nodes.length} 54Z` });
    nodes.forEach((n, i) => {
      if (marks.same.has(n.value)) make(this.memory, "line", {
        x1: i + 0.5, x2: i + 0.5, y1: 0, y2: 56, "vector-effect": "non-scaling-stroke" });
    });
  }
}

function marked() {
  const at = state.kept || state.pointed;
  const members = at && at.column.groups[at.group] ? at.column.groups[at.group].members : [];
  return {
    same: new Set(members.map(n => n.value)),
    of: new Set(members.map(n => n.of).filter(value => value !== null)),
    lines: new Set(members.map(n => n.line).filter(line => line)),
  };
}

function matches(n) {
  const q = state.query;
  return q && [n.name, n.op, n.type, n.line, n.function, n.module].some(t => t.toLowerCase().includes(q));
}

function point(to) {
  const before = state.pointed;
  state.pointed = to;
  if (to && before && to.column === before.column && to.group === before.group && !state.kept) return;
  if (!to && !before) return;
  for (const column of columns) column.draw();
  if (to) describe(to.column.groups[to.group].members);
}

function describe(members) {
  const total = what => members.reduce((sum, n) => sum + n[what], 0);
  const lines = [...new Set(members.map(n => n.line).filter(line => line))];
  const shown = members.slice(0, 3).map(n =>
    `${n.code}\n  ${n.type}  ${n.mark ? "(" + n.mark + ")" : ""}`);
  if (members.length > 3) shown.push(`… ${members.length - 3} more`);
  element("details").textContent = [
    ...shown,
    `${bytes(total("bytes"))}, moves ${bytes(total("cost"))} or as long, ${total("flops").toLocaleString()} flops, `
      + `${bytes(Math.max(...members.map(n => n.live)))} live`,
    ...lines.slice(0, 3)].join("\n");
}

function search() {
  state.query = element("search").value.trim().toLowerCase();
  let count = 0, first = null;
  for (const column of columns) {
    column.stage.nodes.forEach((n, i) => {
      if (!matches(n)) return;
      count += 1;
      first ||= [column, column.group[i]];
    });
  }
  element("found").textContent = state.query ? `${count} found` : "";
  for (const column of columns) column.draw();
  if (first) first[0].show(first[1]);
}

let columns = [];
function shownStages() {
  element("columns").replaceChildren();
  state.pointed = state.kept = null;
  columns = [];
  const boxes = [...document.querySelectorAll("nav input")];
  // all columns stand before one is measured
  const chosen = data.stages.filter((_, i) => boxes[i].checked);
  for (const stage of chosen) columns.push(new Column(stage));
  for (const column of columns) column.arrange();
}

function start() {
  document.querySelector("h1").textContent = document.title = data.title;
  const halves = data.stages.filter(s => s.made_by === "forward" || s.made_by === "backward");
  data.stages.forEach((stage, i) => {
    const label = make(element("stages"), "label");
    const box = make(label, "input", { type: "checkbox" });
    box.checked = halves.length ? i === 0 || halves.includes(stage) : i < 3;
    box.addEventListener("change", shownStages);
    label.append(` ${stage.made_by} (${stage.size})`);
  });
  const key = make(document.querySelector("header"), "div", { class: "key" });
  for (const kind of ["input", "view", "pointwise", "product", "kernel", "saved", "recomputed", "derivative"]) {
    const svg = make(key, "svg", { width: 78, height: 18 });
    const g = make(svg, "g", { class: "node " + kind, transform: "translate(38 9)" });
    make(g, "rect", { x: -36, y: -7.5, width: 72, height: 15 });
    make(g, "text", { y: 4 }, kind);
  }
  element("level").addEventListener("change", e => {
    state.level = e.target.value;
    state.pointed = state.kept = null;
    for (const column of columns) column.arrange();
  });
  element("search").addEventListener("input", search);
  window.addEventListener("resize", () => columns.forEach(column => column.draw()));
  shownStages();
}
start();
