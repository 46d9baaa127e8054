"""Cost of the pack's web extension: of loading the host's page, and of a drawn frame with 20 nodes.

`COMFYUI_PATH=... python -m tests.benchmarks.page_cost` with the Python of a ComfyUI, and Chromium.
Pages with the extension and without it (its files are blocked) alternate in one browser.
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
const timer = setInterval(() => {
  if (!window.LiteGraph?.registered_node_types?.RetrievalMap) return;
  if (!window.comfyAPI?.app?.app?.extensionManager?.command) return;
  globalThis.ready = performance.now();
  clearInterval(timer);
}, 2);"""
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
    """Milliseconds of the page's main thread so far: scripts, styles, layout, painting."""
    metrics = page.call("Performance.getMetrics")["metrics"]
    return 1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration")


def measure(page, server, picture: dict, blocked: bool, vue: bool) -> dict[str, float]:
    server.post("/settings", {"Comfy.VueNodes.Enabled": vue})
    origin = server.address
    page.call("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
    pattern = ["*/extensions/retrieval-controlnet/*.js"] if blocked else []
    page.call("Network.setBlockedURLs", urls=pattern)
    page.go(origin)
    page.wait("globalThis.ready")
    page.run("new Promise((done) => setTimeout(() => done(1), 2000))")
    loading = {"load": page.run("ready"), "load_busy": read_busy(page)}
    page.run("globalThis.app = comfyAPI.app.app, 1")
    page.run("app.graph.clear(), 1")
    fill(page, picture)
    before = read_busy(page)
    page.run(PAN)
    return {**loading, "frame": (read_busy(page) - before) / FRAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="pages of each kind")
    repeats = parser.parse_args().repeats
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
        page.call("Performance.enable")
        page.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        for vue in (False, True):
            measure(page, server, picture, False, vue)  # fills the browser's cache
            kinds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
            for number in range(repeats):
                for blocked in ((False, True), (True, False))[number % 2]:
                    kinds[blocked].append(measure(page, server, picture, blocked, vue))
            print(f"ComfyUI {version}, {'Nodes 2.0' if vue else 'classic canvas'}, medians in ms:")
            for name, what in (
                ("load", "page load until its nodes are known"),
                ("load_busy", "main thread during the load"),
                ("frame", f"main thread for a drawn frame with {NODES} nodes"),
            ):
                ours, theirs = (
                    statistics.median(run[name] for run in kinds[blocked])
                    for blocked in (False, True)
                )
                added = f"{ours:.2f} with the extension, {theirs:.2f} without, "
                print(f"  {what}: {added}{ours - theirs:+.2f}")


if __name__ == "__main__":
    main()
