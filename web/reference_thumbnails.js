// Thumbnails of the references that a node adds: concept, weight, and how much the mask keeps.

import { addDrawing, growToFit, make, makePicture, percent } from "./node_drawing.js";

const HEIGHT = 120;

function makeTile(reference) {
  const lines = [reference.concept, `weight ${Number(reference.weight.toFixed(2))}`];
  if (reference.kept < 1) lines.push(`mask keeps ${percent(reference.kept)}`);
  const caption = make("figcaption", { innerText: lines.join("\n") });
  const missing = reference.image
    ? "The picture is gone from the temp folder; run again."
    : "No picture was saved with this reference.";
  return make("figure", { title: lines.join(", ") }, makePicture(reference.image, missing), caption);
}

// Shows the reference being encoded, a blob.
function showPreview(element, preview) {
  const image = make("img", { src: URL.createObjectURL(preview) });
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  const caption = make("figcaption", { textContent: "being encoded" });
  const tile = make("figure", {}, image, caption);
  element.replaceChildren(make("div", { className: "tiles" }, tile));
}

// Returns the function that shows a run's references, or the one being encoded.
export function addThumbnails(node) {
  const element = addDrawing(node, "drawn_references", HEIGHT);
  return ({ retrieval_references: references, preview }) => {
    if (preview) showPreview(element, preview);
    if (!references) return;
    element.replaceChildren(make("div", { className: "tiles" }, ...references.map(makeTile)));
    if (node.comfyClass === "RetrievalLoadReferences") {
      element.dataset.file = node.widgets.find((widget) => widget.name === "file").value;
      showMissingFile(node);
    }
    growToFit(node, element, HEIGHT);
  };
}

// Says so if the file whose references are shown is no longer in the list.
export function showMissingFile(node) {
  const { element } = node.widgets.find((widget) => widget.name === "drawn_references");
  const { options } = node.widgets.find((widget) => widget.name === "file");
  const { file } = element.dataset;
  element.querySelector(".warning")?.remove();
  if (file && !options.values.includes(file)) {
    const text = `${file} is no longer in models/retrieval_references; shown as it was read.`;
    element.prepend(make("div", { className: "warning", textContent: text }));
  }
}
