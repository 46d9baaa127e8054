"""Cost of the pack's web extension: of loading the host's page, and of a drawn frame with 20 nodes.

`COMFYUI_PATH=... python -m tests.benchmarks.page_cost` with the Python of a ComfyUI, and Chromium.
Pages with the extension and without it (its file is blocked) alternate in one browser. The page
waits for the extension between importing it and asking for the nodes: what comes before is the same
with and without, and a whole load, which is nearly all the host's, spreads by much more than that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.conftest import find_comfyui, no_chromium_line, no_host_line

PACK = Path(__file__).resolve().parents[2]
DRAWN = (
    "RetrievalEncodeReferences",
    "RetrievalLoadReferences",
    "RetrievalControls",
    "RetrievalApplyReferences",
    "RetrievalMap",
)
NODES, FRAMES = 20, 200
# When the page has drawn its canvas and knows our nodes, in ms since the navigation.
WATCH = """globalThis.ready = 0;
performance.setResourceTimingBufferSize(5000);
const timer = setInterval(() => {
  if (!window.LiteGraph?.registered_node_types?.RetrievalMap) return;
  if (!window.comfyAPI?.app?.app?.extensionManager?.command) return;
  globalThis.ready = performance.now();
  clearInterval(timer);
}, 2);"""
# ms from the import of the extension to the request for the nodes, and the whole load.
LOADED = """(() => {
  const started = (path) =>
    performance.getEntriesByType("resource").find(({ name }) => name.includes(path)).startTime;
  return { waited: started("/object_info") - started("/extensions/retrieval-controlnet/"), ready };
})()"""
# The canvas moves in every frame, and with it what is laid over it.
PAN = f"""new Promise((done) => {{
  let left = {FRAMES};
  const frame = () => {{
    if (left-- === 0) return done(1);
    app.canvas.ds.offset[0] += left % 2 ? 3 : -3;
    app.canvas.draw(true, true);
    requestAnimationFrame(frame);
  }};
  requestAnimationFrame(frame);
}})"""
SHARES = "AAAA" * 85 + "AA=="  # of two kinds at 16 x 8 positions


def fill(page, picture: dict) -> None:
    """Adds the nodes, showing four references each, or a map."""
    reference = {"image": picture, "concept": "figure", "weight": 1, "kept": 0.5}
    reference["colour"] = [230, 60, 60]
    shown = {"pictures": [picture], "references": [reference], "height": 16, "width": 8}
    output = {
        "retrieval_references": [reference] * 4,
        "retrieval_map": [{**shown, "shares": SHARES}],
    }
    page.run(
        f"""Array.from({{ length: {NODES} }}, (_, i) => {{
            const node = LiteGraph.createNode({json.dumps(DRAWN)}[i % {len(DRAWN)}]);
            node.pos = [(i % 5) * 340, Math.floor(i / 5) * 560];
            app.graph.add(node);
            node.onExecuted?.({json.dumps(output)});
        }}).length"""
    )
    page.run("app.extensionManager.command.execute('Comfy.Canvas.FitView').then(() => 1)")
    page.run("new Promise((done) => setTimeout(() => done(1), 1500))")


def read_busy(page) -> float:
    """CPU milliseconds of the page's main thread so far: scripts, styles, layout, painting."""
    metrics = page.call("Performance.getMetrics")["metrics"]
    return 1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration")


def load(page, server, blocked: bool, vue: bool) -> dict[str, float]:
    """Opens the page anew. Milliseconds."""
    server.post("/settings", {"Comfy.VueNodes.Enabled": vue})
    origin = server.address
    page.call("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
    pattern = ["*/extensions/retrieval-controlnet/*.js"] if blocked else []
    page.call("Network.setBlockedURLs", urls=pattern)
    page.go(origin)
    page.wait("globalThis.ready")
    page.run("new Promise((done) => setTimeout(() => done(1), 2000))")
    return {**page.run(LOADED), "busy": read_busy(page)}


def draw(page, picture: dict) -> float:
    """Milliseconds of the page's main thread for a frame with the nodes."""
    page.run("globalThis.app = comfyAPI.app.app, 1")
    page.run("app.graph.clear(), 1")
    fill(page, picture)
    before = read_busy(page)
    page.run(PAN)
    return (read_busy(page) - before) / FRAMES


def describe(pairs: list[tuple[float, float]]) -> str:
    """What is without the extension, and the differences that it makes, of (with, without)."""
    differences = [ours - theirs for ours, theirs in pairs]
    low, middle, high = statistics.quantiles(differences, n=4)
    without = statistics.median(theirs for _, theirs in pairs)
    return f"{without:.2f} without, {middle:+.2f} with (quartiles {low:+.2f}, {high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=20, help="pairs of pages loaded")
    parser.add_argument("--repeats", type=int, default=4, help="how many of them are drawn on")
    given = parser.parse_args()
    why = no_host_line() or no_chromium_line()
    if why:
        raise SystemExit(why)
    sys.path[:0] = [str(PACK / "tests" / name) for name in ("helpers", "host", "browser")]
    from chromium import open_page
    from serving import running

    with (
        tempfile.TemporaryDirectory() as folder,
        running(find_comfyui(), Path(folder, "server")) as server,
        open_page(Path(folder, "profile")) as page,
    ):
        server.post("/settings", {"Comfy.TutorialCompleted": True})
        Image.new("RGB", (128, 128), "teal").save(Path(folder, "server", "temp", "tile.png"))
        picture = {"filename": "tile.png", "subfolder": "", "type": "temp"}
        version = server.json("/system_stats")["system"]["comfyui_version"]
        page.call("Performance.enable", timeDomain="threadTicks")
        page.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        for vue in (False, True):
            load(page, server, False, vue)  # fills the browser's cache
            pairs = []
            for number in range(given.loads):
                pair = {}
                for blocked in ((False, True), (True, False))[number % 2]:
                    pair[blocked] = load(page, server, blocked, vue)
                    if number < given.repeats:
                        pair[blocked]["frame"] = draw(page, picture)
                pairs.append((pair[False], pair[True]))
            print(f"ComfyUI {version}, {'Nodes 2.0' if vue else 'classic canvas'}, medians in ms:")
            for name, what in (
                ("waited", "from the import of extensions to the request for the nodes"),
                ("ready", "page load until its nodes are known"),
                ("busy", "main thread during the load"),
                ("frame", f"main thread for a drawn frame with {NODES} nodes"),
            ):
                kept = [(ours[name], theirs[name]) for ours, theirs in pairs if name in ours]
                print(f"  {what}, {len(kept)} pairs: {describe(kept)}", flush=True)


if __name__ == "__main__":
    main()
