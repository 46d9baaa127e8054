// Draws on the pack's nodes: the references in use, the strength over sampling, the retrieval map.
// Everything drawn comes from a node's values or from its last run; nothing is saved with a workflow.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { on } from "./node_drawing.js";
import { addThumbnails, showMissingFile } from "./reference_thumbnails.js";
import { addMap } from "./retrieval_map.js";
import { addCurve } from "./strength_curve.js";

const ADDERS = {
  RetrievalEncodeReferences: addThumbnails,
  RetrievalLoadReferences: addThumbnails,
  RetrievalControls: addCurve,
  RetrievalApplyReferences: addCurve,
  RetrievalMap: addMap,
};

// Node -> the function that shows what its last run gave.
const shows = new WeakMap();

function findNode(graph, locator) {
  // A node's outputs are filed under its id, inside a subgraph under "<subgraph's UUID>:<id>".
  const [id, subgraph] = String(locator).split(":").reverse();
  const home = subgraph ? graph.subgraphs?.get(subgraph) : graph;
  return home?.getNodeById(id);
}

// The node with an id of the running prompt: within subgraphs "<subgraph node's id>:<id>".
function findRunning(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph ?? app.graph;
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
      shows.get(findNode(app.rootGraph ?? app.graph, locator))?.(output);
    }
  },

  // The user reloaded the lists of files.
  refreshComboInNodes() {
    for (const node of app.graph.nodes) {
      if (node.comfyClass === "RetrievalLoadReferences") showMissingFile(node);
    }
  },
});
