// The strength over sampling, as the values of Apply Reference Retrieval and Retrieval Controls say.

import { addDrawing, growToFit, make, on, percent } from "./node_drawing.js";

const HEIGHT = 64;
const POINTS = 100;
const NUMBERS = "numbers";

// As CURVES and StrengthCurve in retrieval_core/sampling/controls.py.
const CURVES = {
  constant: { factors: [1], smooth: false },
  "ease in": { factors: [0, 1], smooth: true },
  "ease out": { factors: [1, 0], smooth: true },
  "ease in and out": { factors: [0, 1, 0], smooth: true },
};

export function parseCurve(text) {
  const named = CURVES[text.trim().toLowerCase()];
  if (named) return named;
  const factors = text.split(",").map((part) => (part.trim() ? Number(part) : NaN));
  return factors.every(Number.isFinite) ? { factors, smooth: false } : null;
}

export function factorAt({ factors, smooth }, position) {
  const last = factors.length - 1;
  const index = Math.min(Math.max(position, 0), 1) * last;
  const left = Math.min(Math.floor(index), Math.max(last - 1, 0));
  const right = Math.min(left + 1, last);
  let t = index - left;
  if (smooth) t = t * t * (3 - 2 * t);
  return factors[left] * (1 - t) + factors[right] * t;
}

// A widget's value, or undefined if a link gives it.
function read(node, name) {
  const input = node.inputs.find((given) => given.widget?.name === name);
  if (input?.link != null) return undefined;
  return node.widgets.find((widget) => widget.name === name).value;
}

// The curve of Retrieval Controls, or a sentence that says why it is not known.
function readCurve(controls) {
  const kind = read(controls, "strength_curve");
  const text = kind === NUMBERS ? read(controls, "curve_numbers") : kind;
  if (text === undefined) return "The curve comes from a link.";
  return parseCurve(text) ?? `'${text}' is not numbers with commas between them.`;
}

// {curve, strength, start, end} of a node, or a sentence that says why it is not known.
function readSchedule(node) {
  let curve = CURVES.constant;
  if (node.comfyClass === "RetrievalControls") {
    curve = readCurve(node);
    return typeof curve === "string" ? curve : { curve, strength: 1, start: 0, end: 1 };
  }
  const slot = node.inputs.findIndex((input) => input.name === "controls");
  if (node.inputs[slot]?.link != null) {
    const controls = node.getInputNode(slot);
    if (controls?.comfyClass !== "RetrievalControls") return "The curve comes from a link.";
    curve = readCurve(controls);
    if (typeof curve === "string") return curve;
  }
  const names = ["strength", "start_percent", "end_percent"];
  const [strength, start, end] = names.map((name) => read(node, name));
  if ([strength, start, end].includes(undefined)) return "Strength, start or end come from a link.";
  if (start > end) return `Retrieval starts at ${start} and ends at ${end}, which is before it.`;
  return { curve, strength, start, end };
}

function makePath({ curve, strength, start, end }, top) {
  const points = [[0, 0], [start, 0]];
  for (let i = 0; i <= POINTS; i++) {
    points.push([start + ((end - start) * i) / POINTS, strength * factorAt(curve, i / POINTS)]);
  }
  points.push([end, 0], [1, 0]);
  return "M" + points.map(([x, y]) => `${100 * x} ${50 - (46 * y) / top}`).join("L");
}

function makeSvg(schedule) {
  const { curve, strength } = schedule;
  const top = Math.max(1, strength * Math.max(...curve.factors));
  const line = (d, stroke, width, fill, dash = "") =>
    `<path d="${d}" fill="${fill}" stroke="${stroke}" stroke-width="${width}"
      stroke-dasharray="${dash}" vector-effect="non-scaling-stroke"/>`;
  const one = 50 - 46 / top;
  return `<svg viewBox="0 0 100 52" preserveAspectRatio="none">
    ${line(`M0 ${one}L100 ${one}`, "#888", 1, "none", "3 3")}
    ${line(makePath(schedule, top), "#4dd0c0", 1.5, "#4dd0c033")}</svg>`;
}

function describe({ curve, strength, start, end }) {
  const factors = curve.factors.map((factor) => strength * factor);
  const [low, high] = [Math.min(...factors), Math.max(...factors)];
  const number = (value) => Number(value.toFixed(2));
  const amount = low === high ? number(low) : `${number(low)} to ${number(high)}`;
  return `strength ${amount}, from ${percent(start)} to ${percent(end)} of sampling`;
}

const drawn = new Set();
let waiting = false;

function draw(node, element) {
  const schedule = readSchedule(node);
  const text = typeof schedule === "string" ? schedule : describe(schedule);
  const svg = typeof schedule === "string" ? "" : makeSvg(schedule);
  if (element.dataset.drawn === text + svg) return;
  element.dataset.drawn = text + svg;
  element.innerHTML = svg;
  element.append(make("div", { className: svg ? "note" : "warning", textContent: text }));
  growToFit(node, element, HEIGHT);
}

// Draws all curves anew in the next frame: one node's values show on others.
function drawSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const [node, element] of drawn) draw(node, element);
  });
}

export function addCurve(node) {
  const element = addDrawing(node, "drawn_curve", HEIGHT, true);
  const entry = [node, element];
  drawn.add(entry);
  for (const widget of node.widgets) on(widget, "callback", drawSoon);
  on(node, "onConfigure", drawSoon);
  on(node, "onConnectionsChange", drawSoon);
  on(node, "onRemoved", () => drawn.delete(entry));
  drawSoon();
}
