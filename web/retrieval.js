// Draws on the pack's nodes: the references in use, the strength over sampling, the retrieval map.
// Everything drawn comes from a node's values or from its last run; nothing is saved with a workflow.
//
// One file, and none of the host's scripts/*.js, which only hand on window.comfyAPI: the host imports
// every .js of web/ and asks for the nodes when it has them all, and no cache answers for any.

const { api } = window.comfyAPI.api;
const { app } = window.comfyAPI.app;

const ADDERS = {
  RetrievalControlNetLoader: keepFiles,
  RetrievalEncodeReferences: addThumbnails,
  RetrievalLoadReferences: addThumbnails,
  RetrievalControls: addCurve,
  RetrievalApplyReferences: addCurve,
  RetrievalMap: addMap,
};

// Node -> the function that shows what its last run gave.
const shows = new WeakMap();

// A node's outputs are filed under its id, inside a subgraph under "<subgraph's UUID>:<id>".
function findNode(locator) {
  const [id, subgraph] = String(locator).split(":").reverse();
  const home = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
  return home?.getNodeById(id);
}

// The node with an id of the running prompt: within subgraphs "<subgraph node's id>:<id>".
function findRunning(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph;
  for (const outer of path.slice(0, -1)) graph = graph?.getNodeById(outer)?.subgraph;
  return graph?.getNodeById(path.at(-1));
}

// A preview of the reference being encoded goes to the thumbnails: the host would leave the last one
// on the node below them. This listener comes before the host's, which stops here.
api.addEventListener("b_preview_with_metadata", (event) => {
  const node = findRunning(event.detail.displayNodeId);
  if (node?.comfyClass !== "RetrievalEncodeReferences") return;
  event.stopImmediatePropagation();
  shows.get(node)({ preview: event.detail.blob });
});

app.registerExtension({
  name: "retrieval-controlnet.nodes",

  nodeCreated(node) {
    const show = ADDERS[node.comfyClass]?.(node);
    if (!show) return;
    shows.set(node, show);
    on(node, "onExecuted", show);
  },

  // A workflow's tab was opened again: its nodes are new and its outputs are old.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      shows.get(findNode(locator))?.(output);
    }
  },

  // The user reloaded the lists of files.
  refreshComboInNodes(definitions) {
    files = listFiles(definitions.RetrievalControlNetLoader);
    for (const { nodes } of [app.rootGraph, ...app.rootGraph.subgraphs.values()]) {
      for (const node of nodes) {
        if (node.comfyClass === "RetrievalControlNetLoader") showFiles(node);
        if (node.comfyClass === "RetrievalLoadReferences") showMissingFile(node);
      }
    }
  },
});

// Load Retrieval ControlNet's list of files, since the user reloaded the lists. The host leaves out
// what a choice shows, and shows the old list again when the choice is made again.

let files = null;

function listFiles(definition) {
  const [, { options }] = definition.input.required.network;
  return options.find(({ key }) => key === "file").inputs.required.file[1].options;
}

function showFiles(node) {
  const file = node.widgets.find((widget) => widget.name === "network.file");
  if (!file || !files) return;
  file.options.values = files;
  file.value ??= files[0]; // the old list was empty
}

function keepFiles(node) {
  const network = node.widgets.find((widget) => widget.name === "network");
  on(network, "callback", () => showFiles(node));
}

// Thumbnails of the references that a node adds: concept, weight, and how much the mask keeps.

const TILES_HEIGHT = 120;

function makeTile(reference) {
  const lines = [reference.concept, say("weight", { weight: round(reference.weight) })];
  if (reference.kept < 1) lines.push(say("kept", { share: percent(reference.kept) }));
  const caption = make("figcaption", { textContent: lines.join("\n") });
  return make("figure", { title: lines.join(", ") }, makePicture(reference.image), caption);
}

// Shows the reference being encoded, a blob.
function showPreview(element, preview) {
  const image = make("img", { src: URL.createObjectURL(preview) });
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  const caption = make("figcaption", { textContent: say("encoding") });
  const tile = make("figure", {}, image, caption);
  element.replaceChildren(make("div", { className: "tiles" }, tile));
}

// Returns the function that shows a run's references, or the one being encoded.
function addThumbnails(node) {
  const element = addDrawing(node, "drawn_references", TILES_HEIGHT);
  return ({ retrieval_references: references, preview }) => {
    if (preview) showPreview(element, preview);
    if (!references) return;
    element.replaceChildren(make("div", { className: "tiles" }, ...references.map(makeTile)));
    if (node.comfyClass === "RetrievalLoadReferences") {
      element.dataset.file = node.widgets.find((widget) => widget.name === "file").value;
      showMissingFile(node);
    }
    growToFit(node, element, TILES_HEIGHT);
  };
}

// Says so if the file whose references are shown is no longer in the list.
function showMissingFile(node) {
  const { element } = node.widgets.find((widget) => widget.name === "drawn_references");
  const { options } = node.widgets.find((widget) => widget.name === "file");
  const { file } = element.dataset;
  element.querySelector(".warning")?.remove();
  if (file && !options.values.includes(file)) {
    const textContent = say("fileGone", { file });
    element.prepend(make("div", { className: "warning", textContent }));
  }
}

// The retrieval map alive: hover over a picture to see which references the place came from, or over
// a reference to see where it was retrieved.

const MAP_HEIGHT = 300;
const TINT_EDGE = 256; // edge of a tint in pixels

function decodeShares(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// Shares [1 + references] of one picture at x, y in 0..1, between the map's positions.
function sharesAt({ bytes, height, width, kinds }, picture, x, y) {
  const find = (position, count) => {
    const at = Math.min(Math.max(position * count - 0.5, 0), count - 1);
    const low = Math.floor(at);
    return [low, Math.min(low + 1, count - 1), at - low];
  };
  const [top, bottom, v] = find(y, height);
  const [left, right, u] = find(x, width);
  const shares = [];
  for (let kind = 0; kind < kinds; kind++) {
    const plane = (picture * kinds + kind) * height;
    const at = (row, column) => bytes[(plane + row) * width + column] / 255;
    const upper = at(top, left) * (1 - u) + at(top, right) * u;
    const lower = at(bottom, left) * (1 - u) + at(bottom, right) * u;
    shares.push(upper * (1 - v) + lower * v);
  }
  return shares;
}

// Tints a canvas over an image with a reference's colour, as strongly as its share.
function tint(canvas, image, { bytes, height, width, kinds }, picture, kind, colour) {
  const pixels = new ImageData(width, height);
  const plane = (picture * kinds + kind) * height * width;
  for (let i = 0; i < height * width; i++) {
    pixels.data.set([...colour, 0.85 * bytes[plane + i]], 4 * i);
  }
  const small = make("canvas", { width, height });
  small.getContext("2d").putImageData(pixels, 0, 0);
  // Of the image's shape, so that both fit their box alike.
  const scale = TINT_EDGE / Math.max(image.naturalWidth, image.naturalHeight);
  canvas.width = Math.round(scale * image.naturalWidth);
  canvas.height = Math.round(scale * image.naturalHeight);
  canvas.getContext("2d").drawImage(small, 0, 0, canvas.width, canvas.height);
}

// Where in the picture, 0..1, the pointer is, given that the image is fitted into its box.
function findPlace(event, image) {
  const box = image.getBoundingClientRect();
  const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  const x = (event.clientX - box.left - (box.width - width) / 2) / width;
  const y = (event.clientY - box.top - (box.height - height) / 2) / height;
  return x >= 0 && x <= 1 && y >= 0 && y <= 1 ? [x, y] : null;
}

class MapDrawing {
  constructor(element, given) {
    const kinds = given.references.length + 1;
    this.map = { ...given, kinds, bytes: decodeShares(given.shares) };
    this.note = make("div", { className: "note", textContent: say("hint") });
    this.warning = make("div", { className: "warning" });
    this.tiles = given.references.map((reference, i) => this.makeTile(reference, i));
    this.pictures = given.pictures.map((file, i) => this.makePicture(file, i));
    const columns = Math.ceil(Math.sqrt(this.pictures.length));
    const pictures = make("div", { className: "pictures" }, ...this.pictures);
    pictures.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
    element.replaceChildren(pictures, this.note);
    if (this.tiles.length) element.append(make("div", { className: "tiles" }, ...this.tiles));
    else this.note.textContent = say("empty");
  }

  makeTile(reference, index) {
    const caption = make("figcaption", { textContent: this.name(index) });
    const tile = make("figure", {}, makePicture(reference.image), caption);
    tile.style.borderColor = `rgb(${reference.colour})`;
    tile.addEventListener("pointerenter", () => this.showReference(index));
    tile.addEventListener("pointerleave", () => this.rest());
    return tile;
  }

  makePicture(file, index) {
    const canvas = make("canvas");
    const image = makePicture(file);
    const picture = make("div", { className: "picture" }, image, canvas);
    if (!this.map.bytes.length) return picture;
    image.addEventListener("load", () => this.checkShape(image));
    picture.addEventListener("pointermove", (event) => {
      const at = image.naturalWidth ? findPlace(event, image) : null;
      if (at) this.showPlace(index, ...at);
      else this.rest();
    });
    picture.addEventListener("pointerleave", () => this.rest());
    return picture;
  }

  checkShape(image) {
    const { height, width } = this.map;
    const ratio = (image.naturalWidth * height) / (image.naturalHeight * width);
    if (Math.abs(Math.log(ratio)) > 1 / Math.min(height, width)) {
      this.note.before(this.warning);
      const picture = `${image.naturalWidth} x ${image.naturalHeight}`;
      this.warning.textContent = say("stretched", { map: `${width} x ${height}`, picture });
    }
  }

  name(index) {
    return `${index + 1}: ${this.map.references[index].concept}`;
  }

  showPlace(picture, x, y) {
    const [none, ...shares] = sharesAt(this.map, picture, x, y);
    const strongest = shares.indexOf(Math.max(...shares));
    this.mark(strongest, (i) => `${this.name(i)} ${percent(shares[i])}`);
    const said = { share: percent(shares[strongest]), none: percent(none) };
    this.note.textContent = say("shares", { name: this.name(strongest), ...said });
    this.tintOnly(strongest, [picture]);
  }

  showReference(index) {
    this.mark(index, (i) => this.name(i));
    this.note.textContent = say("retrieved", { name: this.name(index) });
    this.tintOnly(index, this.pictures.keys());
  }

  rest() {
    this.mark(-1, (i) => this.name(i));
    this.note.textContent = say("hint");
    this.tintOnly(-1, []);
  }

  mark(chosen, caption) {
    this.tiles.forEach((tile, i) => {
      tile.style.opacity = chosen < 0 || i === chosen ? 1 : 0.35;
      tile.querySelector("figcaption").textContent = caption(i);
    });
  }

  tintOnly(index, pictures) {
    for (const picture of this.pictures) picture.querySelector("canvas").width = 0;
    for (const i of pictures) {
      const [image, canvas] = ["img", "canvas"].map((tag) => this.pictures[i].querySelector(tag));
      const { colour } = this.map.references[index];
      if (image) tint(canvas, image, this.map, i, index + 1, colour);
    }
  }
}

// Returns the function that shows a run's map.
function addMap(node) {
  const element = addDrawing(node, "drawn_map", MAP_HEIGHT);
  return ({ retrieval_map: maps }) => {
    if (!maps) return;
    new MapDrawing(element, maps[0]);
    growToFit(node, element, MAP_HEIGHT);
  };
}

// The strength over sampling, as the values of Apply Reference Retrieval and Retrieval Controls say.

const CURVE_HEIGHT = 64;
const POINTS = 100;
const TRAINED_COLOUR = "#e0a040";
const NUMBERS = "numbers";

// As CURVES and StrengthCurve in retrieval_core/sampling/controls.py.
const CURVES = {
  constant: { factors: [1], smooth: false },
  "ease in": { factors: [0, 1], smooth: true },
  "ease out": { factors: [1, 0], smooth: true },
  "ease in and out": { factors: [0, 1, 0], smooth: true },
};

// As PRESETS in retrieval_core/sampling/presets.py.
const PRESETS = {
  "prompt first": { strength: 1, end: 0.7 },
  balanced: { strength: 1, end: 1 },
  "character first": { strength: 1.5, end: 1 },
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
function readValue(node, name) {
  const input = node.inputs.find((given) => given.widget?.name === name);
  if (input?.link != null) return undefined;
  return node.widgets.find((widget) => widget.name === name).value;
}

// The curve of Retrieval Controls, or a sentence that says why it is not known.
function readCurve(controls) {
  const kind = readValue(controls, "strength_curve");
  const text = kind === NUMBERS ? readValue(controls, "curve_numbers") : kind;
  if (text === undefined) return say("curveLinked");
  return parseCurve(text) ?? say("notNumbers", { text });
}

// {curve, strength, start, end, preset} of a node, or a sentence that says why it is not known.
function readSchedule(node) {
  let curve = CURVES.constant;
  if (node.comfyClass === "RetrievalControls") {
    curve = readCurve(node);
    const whole = { curve, strength: 1, start: 0, end: 1, preset: "balanced" };
    return typeof curve === "string" ? curve : whole;
  }
  const slot = node.inputs.findIndex((input) => input.name === "controls");
  if (node.inputs[slot]?.link != null) {
    const controls = node.getInputNode(slot);
    if (controls?.comfyClass !== "RetrievalControls") return say("curveLinked");
    curve = readCurve(controls);
    if (typeof curve === "string") return curve;
  }
  const names = ["strength", "start_percent", "end_percent", "preset"];
  const values = names.map((name) => readValue(node, name));
  if (values.includes(undefined)) return say("valuesLinked");
  const [strength, start, end, preset] = values;
  if (start > end) return say("endsBefore", { start, end });
  return { curve, strength, start, end, preset };
}

// As Preset.limit in retrieval_core/sampling/presets.py: what a trained network makes of a schedule.
// Training-free, a preset leaves the strength alone; which of both is meant, the node cannot tell.
export function limitSchedule(schedule) {
  const { strength, end } = PRESETS[schedule.preset];
  return {
    ...schedule,
    strength: strength * schedule.strength,
    end: Math.max(schedule.start, Math.min(schedule.end, end)),
  };
}

function makePath({ curve, strength, start, end }, top) {
  const points = [[0, 0], [start, 0]];
  for (let i = 0; i <= POINTS; i++) {
    points.push([start + ((end - start) * i) / POINTS, strength * factorAt(curve, i / POINTS)]);
  }
  points.push([end, 0], [1, 0]);
  return "M" + points.map(([x, y]) => `${100 * x} ${50 - (46 * y) / top}`).join("L");
}

// Draws the schedule, and a trained network's where it is another.
function makeSvg(schedule, trained) {
  const strongest = Math.max(schedule.strength, trained?.strength ?? 0);
  const top = Math.max(1, strongest * Math.max(...schedule.curve.factors));
  const line = (d, stroke, width, fill, dash = "") =>
    `<path d="${d}" fill="${fill}" stroke="${stroke}" stroke-width="${width}"
      stroke-dasharray="${dash}" vector-effect="non-scaling-stroke"/>`;
  const one = 50 - 46 / top;
  return `<svg viewBox="0 0 100 52" preserveAspectRatio="none">
    ${line(`M0 ${one}L100 ${one}`, "#888", 1, "none", "3 3")}
    ${line(makePath(schedule, top), "#4dd0c0", 1.5, "#4dd0c033")}
    ${trained ? line(makePath(trained, top), TRAINED_COLOUR, 1.5, "none") : ""}</svg>`;
}

function describeStrength({ curve, strength }) {
  const factors = curve.factors.map((factor) => strength * factor);
  const [low, high] = [Math.min(...factors), Math.max(...factors)].map(round);
  return low === high ? low : say("range", { low, high });
}

function describeSchedule(key, schedule) {
  const [start, end] = [percent(schedule.start), percent(schedule.end)];
  return say(key, { strength: describeStrength(schedule), start, end });
}

const curves = new Set();
let drawingSoon = false;

function drawCurve(node, element) {
  const schedule = readSchedule(node);
  let [svg, text, more] = ["", schedule, ""];
  if (typeof schedule !== "string") {
    const limited = limitSchedule(schedule);
    const acts = limited.strength !== schedule.strength || limited.end !== schedule.end;
    svg = makeSvg(schedule, acts ? limited : null);
    text = describeSchedule("schedule", schedule);
    if (acts) more = describeSchedule("trained", limited);
  }
  if (element.dataset.drawn === text + more + svg) return;
  element.dataset.drawn = text + more + svg;
  element.innerHTML = svg;
  element.append(make("div", { className: svg ? "note" : "warning", textContent: text }));
  if (more) {
    const note = make("div", { className: "note", textContent: more });
    note.style.color = TRAINED_COLOUR;
    element.append(note);
  }
  growToFit(node, element, CURVE_HEIGHT);
}

// Draws all curves anew in the next frame: one node's values show on others.
function drawCurvesSoon() {
  if (drawingSoon) return;
  drawingSoon = true;
  requestAnimationFrame(() => {
    drawingSoon = false;
    for (const [node, element] of curves) drawCurve(node, element);
  });
}

function addCurve(node) {
  const element = addDrawing(node, "drawn_curve", CURVE_HEIGHT);
  const entry = [node, element];
  curves.add(entry);
  for (const widget of node.widgets) on(widget, "callback", drawCurvesSoon);
  on(node, "onConfigure", drawCurvesSoon);
  on(node, "onConnectionsChange", drawCurvesSoon);
  on(node, "onRemoved", () => curves.delete(entry));
  drawCurvesSoon();
}

// What the drawings share: a widget without a value, pictures of the host's temp folder.

let styles = null;

function addStyle() {
  if (styles) return;
  const href = new URL("retrieval.css", import.meta.url);
  styles = make("link", { id: "retrieval-style", rel: "stylesheet", href });
  styles.addEventListener("load", () => app.canvas.setDirty(true));
  document.head.append(styles);
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const heightOf = (element, height) => (element.hasChildNodes() ? height : 0);

// Adds an element below a node's widgets, `minHeight` pixels high unless it is empty. It has no value,
// in workflows and in prompts. No input may have its name, by which Nodes 2.0 tells widgets apart.
function addDrawing(node, name, minHeight) {
  addStyle();
  const element = make("div", { className: "retrieval" });
  const widget = node.addDOMWidget(name, "retrieval_drawing", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => heightOf(element, minHeight),
  });
  widget.serialize = false;
  widget.serializeValue = () => undefined;
  drawStill(node, widget);
  return element;
}

// Makes room for what an element now shows; a node is never made smaller.
function growToFit(node, element, minHeight) {
  element.style.minHeight = `${heightOf(element, minHeight)}px`;
  const [width, height] = node.computeSize();
  const size = [Math.max(node.size[0], width), Math.max(node.size[1], height)];
  if (size[0] > node.size[0] || size[1] > node.size[1]) node.setSize(size);
  node.setDirtyCanvas(true, true);
}

// The classic canvas: in every frame the host places each element over it anew, which takes longer
// than all else that the frame adds. So an element is there while the pointer is over its node;
// otherwise the canvas draws a still of it, a bitmap of what the browser lays out.

let hovered = null; // the node under the pointer

// Draws a widget's element as a still unless the pointer is over its node.
function drawStill(node, widget) {
  const { element, isVisible } = widget;
  let still = null;
  let taken = ""; // size, zoom and colour of the still
  on(node, "onMouseEnter", () => (hovered = node));
  on(node, "onMouseLeave", () => (hovered = null));
  widget.isVisible = () => hovered === node && isVisible.call(widget);
  on(widget, "draw", (context, _, nodeWidth, y) => {
    if (hovered === node || !element.hasChildNodes() || !styles.sheet) return;
    const { margin } = widget;
    const [width, height] = [nodeWidth - 2 * margin, widget.computedHeight - 2 * margin];
    const zoom = Math.min(2 ** Math.ceil(Math.log2(context.getTransform().a)), 4);
    const wanted = [width, height, zoom, LiteGraph.WIDGET_TEXT_COLOR].join();
    if (!still || taken !== wanted) still = takeStill(element, width, height, zoom);
    taken = wanted;
    context.drawImage(still, margin, y + margin, still.width / zoom, still.height / zoom);
  });
  const drop = () => {
    if (still) node.setDirtyCanvas(true);
    still = null;
  };
  const every = { subtree: true, childList: true, characterData: true, attributes: true };
  new MutationObserver(drop).observe(element, every);
  element.addEventListener("load", drop, true);
}

// A bitmap of an element laid out in a box of the page that is not seen, or higher if it needs more.
function takeStill(element, width, height, zoom) {
  const stage = make("div", { className: "retrieval-stage" }, element);
  Object.assign(stage.style, { width: `${width}px`, height: `${height}px` });
  document.body.append(stage);
  const box = element.getBoundingClientRect();
  const still = make("canvas", { width: width * zoom, height: box.height * zoom });
  const context = still.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.scale(zoom, zoom);
  context.translate(-box.x, -box.y);
  paint(context, element);
  stage.remove();
  element.remove();
  return still;
}

// Draws a laid-out element at its place on the page: box, picture or curve, and what is in it.
function paint(context, element) {
  const style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  context.save();
  paintBox(context, box, style);
  if (["img", "canvas"].includes(element.localName)) paintPicture(context, element, box);
  for (const child of element.childNodes) {
    if (child.localName === "path") paintPath(context, child, box);
    else if (child instanceof Text) paintText(context, child, style);
    else paint(context, child);
  }
  context.restore();
}

// The box of an element; what is drawn next stays in it if nothing may overflow it.
function paintBox(context, { x, y, width, height }, style) {
  const [border, radius] = [parseFloat(style.borderTopWidth), parseFloat(style.borderRadius)];
  context.beginPath();
  context.roundRect(x, y, width, height, radius);
  context.fillStyle = style.backgroundColor;
  context.fill();
  if (style.overflowY !== "visible") context.clip();
  if (!border) return;
  context.beginPath();
  context.roundRect(x + border / 2, y + border / 2, width - border, height - border, radius);
  context.strokeStyle = style.borderTopColor;
  context.lineWidth = border;
  context.stroke();
}

// Fits an image or a canvas into its box.
function paintPicture(context, picture, box) {
  const { naturalWidth: width = picture.width, naturalHeight: height = picture.height } = picture;
  if (!width) return;
  const scale = Math.min(box.width / width, box.height / height);
  const [across, down] = [width * scale, height * scale];
  const [x, y] = [box.x + (box.width - across) / 2, box.y + (box.height - down) / 2];
  context.drawImage(picture, x, y, across, down);
}

// A path of an <svg>, which is stretched over its box; its lines are not.
function paintPath(context, path, box) {
  const { width, height } = path.ownerSVGElement.viewBox.baseVal;
  const stretch = [box.width / width, 0, 0, box.height / height, box.x, box.y];
  const placed = new Path2D();
  placed.addPath(new Path2D(path.getAttribute("d")), new DOMMatrix(stretch));
  const [fill, stroke] = [path.getAttribute("fill"), path.getAttribute("stroke")];
  if (fill !== "none") {
    context.fillStyle = fill;
    context.fill(placed);
  }
  context.strokeStyle = stroke;
  context.lineWidth = path.getAttribute("stroke-width");
  context.setLineDash(path.getAttribute("stroke-dasharray").split(" ").map(Number));
  context.stroke(placed);
}

// Draws a text where the browser broke it into lines.
function paintText(context, text, style) {
  const range = document.createRange();
  const lines = new Map(); // by the bottom of its letters: the line's left edge and its letters
  for (let i = 0; i < text.length; i++) {
    range.setStart(text, i);
    range.setEnd(text, i + 1);
    const [box] = range.getClientRects();
    if (!box?.width) continue;
    const line = lines.get(box.bottom) ?? { left: box.left, letters: "" };
    line.letters += text.data[i];
    lines.set(box.bottom, line);
  }
  context.font = style.font;
  context.fillStyle = style.color;
  context.textBaseline = "bottom";
  for (const [bottom, { left, letters }] of lines) context.fillText(letters, left, bottom);
}

// Runs a function before what a node does itself on an event.
function on(node, event, act) {
  const earlier = node[event];
  node[event] = function (...given) {
    act(...given);
    return earlier?.apply(this, given);
  };
}

// A picture, or a label where there is none: the temp folder is emptied when the host starts.
function makePicture(file) {
  const textContent = say(file ? "gone" : "unsaved");
  const gone = () => make("div", { className: "gone", textContent });
  if (!file) return gone();
  const image = make("img", { src: api.apiURL(`/view?${new URLSearchParams(file)}`) });
  image.draggable = false;
  image.addEventListener("error", () => image.replaceWith(gone()), { once: true });
  return image;
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function round(value) {
  return Number(value.toFixed(2));
}

// A text in the page's language, or in English, with its {names} filled in.
function say(key, values = {}) {
  const texts = TEXTS[app.extensionManager.setting.get("Comfy.Locale")] ?? TEXTS.en;
  return texts[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

const TEXTS = {
  en: {
    weight: "weight {weight}",
    kept: "mask keeps {share}",
    gone: "The picture is gone from the temp folder; run again.",
    unsaved: "No picture was saved with this reference.",
    encoding: "being encoded",
    fileGone: "{file} is no longer in models/retrieval_references; shown as it was read.",
    hint: "Hover over a picture or a reference.",
    empty:
      "Nothing was recorded: in no step did a reference act where the map is measured; see " +
      "strength, start, end and controls.",
    stretched:
      "The map of {map} places was recorded for a picture of another shape than {picture} and is " +
      "stretched.",
    shares: "Reference {name}: {share} of the attention, no reference: {none}",
    retrieved: "Where reference {name} was retrieved",
    curveLinked: "The curve comes from a link.",
    notNumbers: "'{text}' is not numbers with commas between them.",
    valuesLinked: "Strength, start, end or preset come from a link.",
    endsBefore: "Retrieval starts at {start} and ends at {end}, which is before it.",
    schedule: "strength {strength}, from {start} to {end} of sampling",
    trained: "trained network: strength {strength}, until {end}",
    range: "{low} to {high}",
  },
  ja: {
    weight: "重み {weight}",
    kept: "マスクで残る部分 {share}",
    gone: "画像は temp フォルダーにもうありません。再実行してください。",
    unsaved: "この参照には画像が保存されていません。",
    encoding: "エンコード中",
    fileGone:
      "{file} は models/retrieval_references にもうありません。読み込んだときの内容を表示しています。",
    hint: "画像か参照にポインターを合わせてください。",
    empty:
      "何も記録されていません。マップを測る箇所で参照が作用したステップがありません。" +
      "強度・開始・終了・詳細設定を確認してください。",
    stretched:
      "{map} のマップは {picture} と縦横比が異なる画像で記録されたため、引き伸ばして表示しています。",
    shares: "参照 {name}：アテンションの {share}、参照なし：{none}",
    retrieved: "参照 {name} が検索された場所",
    curveLinked: "カーブはリンクから渡されます。",
    notNumbers: "「{text}」はカンマで区切った数値ではありません。",
    valuesLinked: "強度・開始・終了・プリセットのいずれかがリンクから渡されます。",
    endsBefore: "検索の終了 {end} が開始 {start} より前です。",
    schedule: "強度 {strength}、サンプリングの {start} から {end} まで",
    trained: "学習済みネットワーク：強度 {strength}、{end} まで",
    range: "{low}～{high}",
  },
  ko: {
    weight: "가중치 {weight}",
    kept: "마스크로 남은 부분 {share}",
    gone: "temp 폴더에 이미지가 더 이상 없습니다. 다시 실행하세요.",
    unsaved: "이 참조에는 저장된 이미지가 없습니다.",
    encoding: "인코딩 중",
    fileGone:
      "models/retrieval_references에 {file} 파일이 더 이상 없습니다. 읽었을 때의 내용을 표시합니다.",
    hint: "이미지나 참조 위에 포인터를 올리세요.",
    empty:
      "기록된 것이 없습니다. 맵을 측정하는 위치에서 참조가 작용한 스텝이 없습니다. " +
      "강도, 시작, 종료와 설정을 확인하세요.",
    stretched:
      "{map} 맵은 크기가 {picture}인 이 이미지와 비율이 다른 이미지로 기록되어 늘려서 표시합니다.",
    shares: "참조 {name}: 어텐션의 {share}, 참조 없음: {none}",
    retrieved: "참조 {name} 검색 위치",
    curveLinked: "곡선은 링크에서 옵니다.",
    notNumbers: "'{text}' 값은 쉼표로 구분한 수치가 아닙니다.",
    valuesLinked: "강도, 시작, 종료 또는 프리셋이 링크에서 옵니다.",
    endsBefore: "검색 종료({end})가 시작({start})보다 앞섭니다.",
    schedule: "강도 {strength}, 샘플링의 {start}부터 {end}까지",
    trained: "학습된 네트워크: 강도 {strength}, {end}까지",
    range: "{low}~{high}",
  },
  zh: {
    weight: "权重 {weight}",
    kept: "遮罩保留 {share}",
    gone: "temp 文件夹中已没有这张图像；请重新运行。",
    unsaved: "这张参考没有保存图像。",
    encoding: "正在编码",
    fileGone: "models/retrieval_references 中已没有 {file}；显示的是读取时的内容。",
    hint: "将指针移到图像或参考上。",
    empty:
      "没有任何记录：在测量检索图的位置，参考在任何一步都没有起作用；请检查强度、开始、结束和设置。",
    stretched: "这张 {map} 的检索图是用形状与 {picture} 不同的图像记录的，显示时经过拉伸。",
    shares: "参考 {name}：占注意力的 {share}，无参考：{none}",
    retrieved: "参考 {name} 被检索的位置",
    curveLinked: "曲线来自连线。",
    notNumbers: "“{text}”不是用逗号分隔的数值。",
    valuesLinked: "强度、开始、结束或预设来自连线。",
    endsBefore: "检索的结束 {end} 早于开始 {start}。",
    schedule: "强度 {strength}，从采样的 {start} 到 {end}",
    trained: "训练好的网络：强度 {strength}，到 {end} 为止",
    range: "{low} 至 {high}",
  },
};
