"""Makes the picture beside each example workflow, which the template browser shows.

    python -m pytest tests/host/thumbnails.py -s

runs the workflows that need no download on a real server and shows their references and results;
the others, which need a checkpoint, are drawn as the graph that they are. Not collected by default.
"""

from __future__ import annotations

import textwrap
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from serving import has_weights
from workflows import FOLDER, api_form, example

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
RUNNABLE = [name for name in NAMES if name.startswith("paperdoll")]
WIDTH = 1024
# A larger picture is a plot. Pictures are drawn in whole pixels, a row of this width at most.
PLOT, PIXELS, MOST = 400, 64, 1024
TITLE, ROW, WIDGET, GAP = 30, 20, 24, 60
DARK, BODY, HEAD, LIGHT, DIM = "#202124", "#35363a", "#2b2c30", "#e8e8e8", "#a8a8a8"
WIRES = {
    "MODEL": "#b39ddb",
    "CLIP": "#ffd500",
    "VAE": "#ff6e6e",
    "IMAGE": "#64b5f6",
    "MASK": "#81c784",
    "LATENT": "#ff9cf9",
    "CONDITIONING": "#ffa931",
    "RETRIEVAL_REFERENCES": "#4dd0c0",
    "RETRIEVAL_CONTROLNET": "#4dd0c0",
}


def font(size: int) -> Any:
    return ImageFont.load_default(size)


def titled(picture: Image.Image, text: str) -> Image.Image:
    made = Image.new("RGB", (picture.width, picture.height + 34), DARK)
    ImageDraw.Draw(made).text((8, 6), text, LIGHT, font(18))
    made.paste(picture, (0, 34))
    return made


def sheet(pictures: np.ndarray, edge: int) -> Image.Image:
    """Pictures side by side, each an exact multiple of its pixels; a plot keeps its shape."""
    height, width = pictures.shape[1:3]
    if min(height, width) > PLOT:
        plot = Image.fromarray(pictures[0])
        plot.thumbnail((PLOT, PLOT), Image.Resampling.LANCZOS)
        return plot
    aspect = width // height
    edge = min(edge, PIXELS * max(1, MOST // (PIXELS * aspect * len(pictures))))
    step = aspect * edge + 8
    row = Image.new("RGB", (len(pictures) * step - 8, edge), DARK)
    for i, picture in enumerate(pictures):
        scaled = Image.fromarray(picture).resize((aspect * edge, edge), Image.Resampling.NEAREST)
        row.paste(scaled, (i * step, 0))
    return row


def results(server, workflow: dict, prompt: dict) -> Image.Image:
    """What a workflow shows and saves, each row under its node's title."""
    # What an earlier workflow showed is cached, and would be missing from this one's results.
    server.post("/free", {"free_memory": True})
    time.sleep(1)
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    titles = {str(n["id"]): n.get("title", n["type"]) for n in workflow["nodes"]}
    rows = []
    for kind, edge in (("PreviewImage", 128), ("SaveImage", 192)):
        for key, node in prompt.items():
            if node["class_type"] == kind:
                rows.append(titled(sheet(server.images(entry, key), edge), titles[key]))
    size = (max(r.width for r in rows) + 24, sum(r.height for r in rows) + 12 * (len(rows) + 1))
    made = Image.new("RGB", size, DARK)
    y = 12
    for row in rows:
        made.paste(row, (12, y))
        y += row.height + 12
    return made


def slots(node: dict) -> list[dict]:
    return [given for given in node.get("inputs", []) if "widget" not in given]


def at(node: dict, index: int, right: bool) -> tuple[float, float]:
    """Where a slot's dot is drawn, as the frontend does."""
    x, y = node["pos"]
    return x + (node["size"][0] if right else 0), y + (index + 0.7) * ROW


def graph(workflow: dict, node_info: dict) -> Image.Image:
    """The workflow drawn from its own positions, sizes, links, titles and values."""
    nodes = workflow["nodes"]
    left, top = (min(n["pos"][i] for n in nodes) - GAP for i in (0, 1))
    right, bottom = (max(n["pos"][i] + n["size"][i] for n in nodes) + GAP for i in (0, 1))
    made = Image.new("RGB", (round(right - left), round(bottom - top)), DARK)
    draw = ImageDraw.Draw(made)
    shifted = {n["id"]: {**n, "pos": [n["pos"][0] - left, n["pos"][1] - top]} for n in nodes}
    for _, source, output, target, slot, kind in workflow["links"]:
        name = shifted[target]["inputs"][slot]["name"]
        index = [given["name"] for given in slots(shifted[target])].index(name)
        start, end = at(shifted[source], output, True), at(shifted[target], index, False)
        draw_wire(draw, start, end, WIRES.get(kind, DIM))
    for node in shifted.values():
        own = node_info.get(node["type"], {}).get("display_name") or node["type"]
        draw_node(draw, node, node.get("title", own))
    return made.resize((WIDTH, round(made.height * WIDTH / made.width)), Image.Resampling.LANCZOS)


def draw_node(draw: ImageDraw.ImageDraw, node: dict, title: str) -> None:
    (x, y), (width, height) = node["pos"], node["size"]
    draw.rounded_rectangle((x, y - TITLE, x + width, y + height), 8, BODY)
    draw.rounded_rectangle((x, y - TITLE, x + width, y), 8, HEAD)
    draw.text((x + 10, y - 25), title, LIGHT, font(16))
    if node["type"] == "MarkdownNote":
        lines = [w for line in node["widgets_values"][0].split("\n") for w in wrapped(line, width)]
        for i, line in enumerate(lines[: int(height // 18)]):
            draw.text((x + 10, y + 6 + 18 * i), line, LIGHT, font(13))
        return
    rows = max(len(slots(node)), len(node["outputs"]))
    for right, listed in ((False, slots(node)), (True, node["outputs"])):
        for i, slot in enumerate(listed):
            cx, cy = at(node, i, right)
            colour = WIRES.get(slot["type"], DIM)
            draw.ellipse((cx - 5, cy - 5, cx + 5, cy + 5), colour)
            where, anchor = (cx - 12, "rm") if right else (cx + 12, "lm")
            draw.text((where, cy), slot["name"], DIM, font(13), anchor=anchor)
    named = [given["name"] for given in node.get("inputs", []) if "widget" in given]
    values = [v for v in node["widgets_values"] if v not in ("fixed", "image")]
    for i, (name, value) in enumerate(zip(named, values)):
        line = y + rows * ROW + 8 + i * WIDGET
        draw.rounded_rectangle((x + 12, line, x + width - 12, line + 20), 10, DARK)
        draw.text((x + 22, line + 10), name, DIM, font(13), anchor="lm")
        text = textwrap.shorten(str(value), max(8, int(width / 7) - len(name) - 8), placeholder="…")
        draw.text((x + width - 22, line + 10), text, LIGHT, font(13), anchor="rm")


def wrapped(line: str, width: float) -> list[str]:
    return textwrap.wrap(line.replace("*", "").replace("`", ""), int(width / 7)) or [""]


def draw_wire(draw: ImageDraw.ImageDraw, start: tuple, end: tuple, colour: str) -> None:
    bend = max(40.0, abs(end[0] - start[0]) / 3)
    points = []
    for t in np.linspace(0, 1, 40):
        a, b, c, d = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
        x = a * start[0] + b * (start[0] + bend) + c * (end[0] - bend) + d * end[0]
        points.append((x, (a + b) * start[1] + (c + d) * end[1]))
    draw.line(points, colour, 3)


def save(picture: Image.Image, name: str) -> None:
    picture.save(FOLDER / f"{name}.jpg", quality=88, optimize=True)
    print(f"\nwrote {FOLDER / name}.jpg, {picture.width} x {picture.height}")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RUNNABLE])
def test_draw(name, node_info):
    save(graph(example(name), node_info), name)


@pytest.mark.skipif(not has_weights(), reason="retrieval_core/paperdoll/weights has no files yet")
@pytest.mark.parametrize("name", RUNNABLE)
def test_run(name, server, node_info):
    workflow = example(name)
    save(results(server, workflow, api_form(workflow, node_info)), name)
