// What the drawings on nodes share: a widget without a value, pictures of the host's temp folder.

import { api } from "../../scripts/api.js";

const STYLE = `
.retrieval { box-sizing: border-box; contain: layout paint style; width: 100%; overflow: hidden;
  font: 11px/1.3 sans-serif; color: var(--input-text, #ddd);
  display: flex; flex-direction: column; gap: 4px; }
.retrieval:empty { display: none; }
.retrieval .tiles { display: grid; gap: 6px; flex: 1 1 0; min-height: 92px; overflow: hidden;
  grid-template-columns: repeat(auto-fill, minmax(58px, 1fr)); align-content: start; }
.retrieval figure { margin: 0; min-width: 0; border: 2px solid transparent; border-radius: 4px; }
.retrieval figure img, .retrieval .gone { display: block; width: 100%; aspect-ratio: 1;
  object-fit: contain; border-radius: 3px; background: var(--comfy-input-bg, #222); }
.retrieval .gone { display: flex; align-items: center; justify-content: center; padding: 4px;
  text-align: center; box-sizing: border-box; color: var(--descrip-text, #999); }
.retrieval figcaption { overflow-wrap: anywhere; text-align: center; padding: 1px 2px; }
.retrieval .note { color: var(--descrip-text, #999); flex: none; }
.retrieval .warning { color: var(--error-text, #ff8a8a); flex: none; }
.retrieval svg { display: block; width: 100%; flex: 1 1 0; min-height: 0; border-radius: 4px;
  background: var(--comfy-input-bg, #222); }
.retrieval .pictures { display: grid; gap: 6px; flex: 2 1 0; min-height: 0; overflow: hidden; }
/* What scrolls is drawn on a layer of its own, in every frame that the canvas moves. */
.retrieval .tiles:hover, .retrieval .pictures:hover { overflow: auto; }
.retrieval .picture { position: relative; min-height: 0; }
.retrieval .picture img, .retrieval .picture canvas { position: absolute; inset: 0; width: 100%;
  height: 100%; object-fit: contain; }
`;

function addStyle() {
  if (document.getElementById("retrieval-style")) return;
  const style = make("style", { id: "retrieval-style", textContent: STYLE });
  document.head.append(style);
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const heightOf = (element, height) => (element.hasChildNodes() ? height : 0);

// Adds an element below a node's widgets, `minHeight` pixels high unless it is empty. It has no value,
// in workflows and in prompts. No input may have its name, by which Nodes 2.0 tells widgets apart.
// `hideOnZoom`: it is left out where the canvas is so small that the host leaves out text.
export function addDrawing(node, name, minHeight, hideOnZoom = false) {
  addStyle();
  const element = make("div", { className: "retrieval" });
  const widget = node.addDOMWidget(name, "retrieval_drawing", element, {
    serialize: false,
    hideOnZoom,
    getMinHeight: () => heightOf(element, minHeight),
  });
  widget.serialize = false;
  widget.serializeValue = () => undefined;
  return element;
}

// Makes room for what an element now shows; a node is never made smaller.
export function growToFit(node, element, minHeight) {
  element.style.minHeight = `${heightOf(element, minHeight)}px`;
  const [width, height] = node.computeSize();
  const size = [Math.max(node.size[0], width), Math.max(node.size[1], height)];
  if (size[0] > node.size[0] || size[1] > node.size[1]) node.setSize(size);
  node.setDirtyCanvas(true, true);
}

// Runs a function before what a node does itself on an event.
export function on(node, event, act) {
  const earlier = node[event];
  node[event] = function (...given) {
    act(...given);
    return earlier?.apply(this, given);
  };
}

// A picture, or a label where its file is gone: the temp folder is emptied when the host starts.
export function makePicture(file, missing) {
  const gone = () => make("div", { className: "gone", textContent: missing });
  if (!file) return gone();
  const image = make("img", { src: api.apiURL(`/view?${new URLSearchParams(file)}`) });
  image.draggable = false;
  image.addEventListener("error", () => image.replaceWith(gone()), { once: true });
  return image;
}

export function percent(share) {
  return `${Math.round(100 * share)} %`;
}
