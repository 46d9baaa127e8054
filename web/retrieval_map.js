// The retrieval map alive: hover over a picture to see which references the place came from, or over
// a reference to see where it was retrieved.

import { addDrawing, growToFit, make, makePicture, percent } from "./node_drawing.js";

const HEIGHT = 300;
const LARGEST = 256; // edge of a tint in pixels
const REST = "Hover over a picture or a reference.";

function decode(text) {
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
  const scale = LARGEST / Math.max(image.naturalWidth, image.naturalHeight);
  canvas.width = Math.round(scale * image.naturalWidth);
  canvas.height = Math.round(scale * image.naturalHeight);
  canvas.getContext("2d").drawImage(small, 0, 0, canvas.width, canvas.height);
}

// Where in the picture, 0..1, the pointer is, given that the image is fitted into its box.
function place(event, image) {
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
    this.map = { ...given, kinds, bytes: decode(given.shares) };
    this.note = make("div", { className: "note", textContent: REST });
    this.warning = make("div", { className: "warning" });
    this.tiles = given.references.map((reference, i) => this.makeTile(reference, i));
    this.pictures = given.pictures.map((file, i) => this.makePicture(file, i));
    const columns = Math.ceil(Math.sqrt(this.pictures.length));
    const pictures = make("div", { className: "pictures" }, ...this.pictures);
    pictures.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
    element.replaceChildren(pictures, this.note);
    if (this.tiles.length) element.append(make("div", { className: "tiles" }, ...this.tiles));
    else this.note.textContent = "Nothing was retrieved: the strength was 0.";
  }

  makeTile(reference, index) {
    const missing = reference.image ? "The picture is gone; run again." : "No picture was saved.";
    const caption = make("figcaption", { textContent: this.name(index) });
    const tile = make("figure", {}, makePicture(reference.image, missing), caption);
    tile.style.borderColor = `rgb(${reference.colour})`;
    tile.addEventListener("pointerenter", () => this.showReference(index));
    tile.addEventListener("pointerleave", () => this.rest());
    return tile;
  }

  makePicture(file, index) {
    const canvas = make("canvas");
    const image = makePicture(file, "The picture is gone from the temp folder; run again.");
    const picture = make("div", { className: "picture" }, image, canvas);
    if (!this.map.bytes.length) return picture;
    image.addEventListener("load", () => this.checkShape(image));
    picture.addEventListener("pointermove", (event) => {
      const at = image.naturalWidth ? place(event, image) : null;
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
      this.warning.textContent =
        `The map of ${width} x ${height} places was recorded for a picture of another shape than ` +
        `${image.naturalWidth} x ${image.naturalHeight} and is stretched.`;
    }
  }

  name(index) {
    return `${index + 1}: ${this.map.references[index].concept}`;
  }

  showPlace(picture, x, y) {
    const [none, ...shares] = sharesAt(this.map, picture, x, y);
    const strongest = shares.indexOf(Math.max(...shares));
    this.mark(strongest, (i) => `${this.name(i)} ${percent(shares[i])}`);
    const said = `Reference ${this.name(strongest)}: ${percent(shares[strongest])} of the attention`;
    this.note.textContent = `${said}, no reference: ${percent(none)}`;
    this.tintOnly(strongest, [picture]);
  }

  showReference(index) {
    this.mark(index, (i) => this.name(i));
    this.note.textContent = `Where reference ${this.name(index)} was retrieved`;
    this.tintOnly(index, this.pictures.keys());
  }

  rest() {
    this.mark(-1, (i) => this.name(i));
    this.note.textContent = REST;
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
export function addMap(node) {
  const element = addDrawing(node, "drawn_map", HEIGHT);
  return ({ retrieval_map: maps }) => {
    if (!maps) return;
    new MapDrawing(element, maps[0]);
    growToFit(node, element, HEIGHT);
  };
}
