"use strict";
// One column for each stage that is shown. A graph draws only the nodes that are in sight, so that
// thousands stay smooth.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 150, HEIGHT = 34, ACROSS = 165, DOWN = 66;
const state = { level: "ops", open: new Set(), pointed: null, kept: null, query: "" };
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

// Where the places of some nodes come to stand without the others: gaps are closed.
function closed(places) {
  const to = new Map();
  let before = null, at = 0;
  for (const place of [...new Set(places)].sort((a, b) => a - b)) {
    if (before !== null) at += Math.min(1, place - before);
    to.set(before = place, at);
  }
  return to;
}

// The nodes of an open group around its middle, and the room that they take.
function inside(places) {
  const xs = closed(places.map(([x]) => x)), ys = closed(places.map(([, y]) => y));
  const across = Math.max(...xs.values()), down = Math.max(...ys.values());
  const around = ([x, y]) => [xs.get(x) - across / 2, ys.get(y) - down / 2 + 0.15]; // below the title
  return { across: across + 1.2, down: down + 1.6, places: places.map(around) };
}

// Where a place is moved by groups that take more room than one node does, on both their sides.
function moved(place, more) {
  let by = 0;
  for (const [at, room] of more) by += Math.sign(place - at) * room / 2;
  return place + by;
}

const short = (text, n) => text.length > n ? text.slice(0, n - 1) + "…" : text;

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

  // The groups of the level, in the places of the arrangement.
  arrange() {
    const { group, names, places } = this.stage.levels[state.level];
    this.closed = places.map(([x, y], i) => ({ x, y, name: names[i], members: [] }));
    group.forEach((g, i) => this.closed[g].members.push(i));
    this.opened();
    const xs = this.items.map(g => g.x), ys = this.items.map(g => g.y);
    const size = this.svg.getBoundingClientRect();
    const wide = Math.max(...xs) - Math.min(...xs) + 2 * WIDTH;
    this.scale = Math.max(0.55, Math.min(1, size.width / wide));
    const first = Math.min(...ys) + 10 * DOWN;
    const top = xs.filter((_, i) => ys[i] < first).sort((a, b) => a - b);
    this.left = top[top.length >> 1] - size.width / this.scale / 2;
    this.top = Math.min(...ys) - HEIGHT;
    this.draw();
  }

  // What is drawn: groups and, where one is open, a frame with its nodes in it. The others make room.
  opened() {
    const { nodes, levels, edges } = this.stage;
    const wider = new Map(), higher = new Map();
    const more = (map, at, room) => map.set(at, Math.max(room, map.get(at) || 0));
    for (const g of this.closed) {
      g.inside = state.open.has(g.name) && g.members.length > 1
        && inside(g.members.map(i => levels.ops.places[i]));
      if (!g.inside) continue;
      more(wider, g.x, g.inside.across - 1);
      more(higher, g.y, g.inside.down - 1);
    }
    this.items = [];
    const itemOf = this.itemOf = [];
    const add = (x, y, members, name, frame) => {
      const across = frame ? frame.across * ACROSS - 12 : WIDTH;
      const down = frame ? frame.down * DOWN - 16 : HEIGHT;
      for (const i of members) itemOf[i] = this.items.length;
      members = members.map(i => nodes[i]);
      this.items.push({ x: x * ACROSS, y: y * DOWN, across, down, members, name, frame });
    };
    for (const g of this.closed) {
      const x = moved(g.x, wider), y = moved(g.y, higher);
      add(x, y, g.members, g.name, g.inside);
      if (g.inside) g.inside.places.forEach(([right, below], k) => add(x + right, y + below, [g.members[k]]));
    }
    const pairs = new Set(edges.map(([a, b]) => `${itemOf[a]} ${itemOf[b]}`));
    this.edges = [...pairs].map(pair => pair.split(" ")).filter(([a, b]) => a !== b);
  }

  // Open a group in every column, or close it; it stays where it is.
  toggle(name) {
    if (!state.open.delete(name)) state.open.add(name);
    for (const column of columns) {
      const item = () => column.items.find(item => item.name === name);
      const before = item();
      column.opened();
      if (!before) continue;
      column.left += item().x - before.x;
      column.top += item().y - before.y;
      if (column === this) state.pointed = state.kept = item();
    }
    for (const column of columns) column.draw();
  }

  listen() {
    let from = null, dragged = false;
    const at = e => this.items[e.target.closest(".node")?.dataset.item] || null;
    this.svg.addEventListener("pointerdown", e => {
      from = [e.clientX, e.clientY, this.left, this.top];
      dragged = false;
    });
    window.addEventListener("pointerup", () => { from = null; });
    this.svg.addEventListener("pointermove", e => {
      if (from) {
        const [right, down] = [e.clientX - from[0], e.clientY - from[1]];
        dragged ||= Math.hypot(right, down) > 3;
        this.left = from[2] - right / this.scale;
        this.top = from[3] - down / this.scale;
        this.later();
      } else if (!state.kept) {
        point(at(e));
      }
    });
    this.svg.addEventListener("click", e => {
      if (dragged) return;
      state.kept = at(e);
      point(state.kept);
      if (state.kept?.members.length > 1) this.toggle(state.kept.name);
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

  show(item) {
    const { x, y } = item, size = this.svg.getBoundingClientRect();
    this.scale = Math.max(this.scale, 0.7);
    this.left = x - size.width / this.scale / 2;
    this.top = y - size.height / this.scale / 2;
    this.draw();
  }

  draw() {
    const size = this.svg.getBoundingClientRect();
    const right = this.left + size.width / this.scale, bottom = this.top + size.height / this.scale;
    const seen = ({ x, y, across, down }) =>
      x > this.left - across && x < right + across && y > this.top - down && y < bottom + down;
    this.svg.replaceChildren();
    const all = make(this.svg, "g", {
      transform: `scale(${this.scale}) translate(${-this.left} ${-this.top})` });
    const marks = marked();
    const near = g => !g.frame && g.members.some(n => marks.same.has(n.value));
    this.items.forEach((g, i) => { if (g.frame && seen(g)) this.frame(all, g, i); });
    const paths = { edges: "", near: "" };
    for (const [a, b] of this.edges) {
      const from = this.items[a], to = this.items[b];
      if (Math.max(from.y, to.y) < this.top || Math.min(from.y, to.y) > bottom) continue;
      const y1 = from.y + HEIGHT / 2, y2 = to.y - HEIGHT / 2, middle = (y1 + y2) / 2;
      paths[near(from) || near(to) ? "near" : "edges"] +=
        `M${from.x} ${y1}C${from.x} ${middle} ${to.x} ${middle} ${to.x} ${y2}`;
    }
    for (const [name, d] of Object.entries(paths)) if (d) make(all, "path", { class: name, d });
    this.items.forEach((g, i) => { if (!g.frame && seen(g)) this.node(all, g, i, marks, near(g)); });
    this.curve(marks);
  }

  frame(parent, { x, y, across, down, members, name }, i) {
    const e = make(parent, "g", {
      class: "node group frame", "data-item": i, "data-name": name, transform: `translate(${x} ${y})` });
    make(e, "rect", { x: -across / 2, y: -down / 2, width: across, height: down });
    make(e, "text", { x: 8 - across / 2, y: 14 - down / 2 }, `▾ ${short(name, across / 6)}, ${members.length} ops`);
  }

  node(parent, g, i, marks, same) {
    const first = g.members[0], one = g.members.length === 1;
    const has = test => g.members.some(test);
    const names = ["node", one ? first.kind : "group"];
    if (has(n => n.mark === "saved")) names.push("saved");
    if (has(n => n.mark === "recomputed")) names.push("recomputed");
    if (has(n => n.result)) names.push("result");
    if (same) names.push("same");
    else if (has(n => marks.same.has(n.of) || marks.of.has(n.value))) names.push("derivative");
    else if (has(n => marks.lines.has(n.line))) names.push("kin");
    if (has(n => matches(n))) names.push("hit");
    const e = make(parent, "g", {
      class: names.join(" "), "data-item": i, "data-name": first.name,
      transform: `translate(${g.x} ${g.y})` });
    make(e, "rect", { x: -WIDTH / 2, y: -HEIGHT / 2, width: WIDTH, height: HEIGHT });
    if (this.scale < 0.3) return;
    const label = one ? (first.kind === "input" ? first.name : first.op)
      : g.name.replace(/^.*?: /, "");
    const under = one ? first.type : `▸ ${g.members.length} ops`;
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
    const at = nodes.map((n, i) => marks.same.has(n.value) ? `M${i + 0.5} 0V56` : "").join("");
    if (at) make(this.memory, "path", { class: "at", d: at, "vector-effect": "non-scaling-stroke" });
  }
}

function marked() {
  const members = (state.kept || state.pointed)?.members || [];
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
  if (to === before && !(to && state.kept)) return;
  for (const column of columns) column.draw();
  if (to) describe(to.members);
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
      first ||= [column, column.items[column.itemOf[i]]];
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
    state.open.clear();
    state.pointed = state.kept = null;
    for (const column of columns) column.arrange();
  });
  element("search").addEventListener("input", search);
  window.addEventListener("resize", () => columns.forEach(column => column.draw()));
  shownStages();
}
start();
