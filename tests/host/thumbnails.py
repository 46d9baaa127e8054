"""Makes the picture beside each example workflow, which the template browser shows in a square.

    python -m pytest tests/host/thumbnails.py -s

runs the demo workflows on a real server: references above, results below. Those for SD 1.5 and SDXL
need a checkpoint that the tests do not have: they get the demo model's pictures in the same set-up,
of other characters, and say so. Not collected by default.
"""

from __future__ import annotations

import time

import pytest
from PIL import Image, ImageDraw, ImageFont
from serving import has_weights, with_inputs
from workflows import FOLDER, api_form, example

EDGE, MARGIN, GAP, LINE = 640, 16, 12, 30
DARK, LIGHT = "#202124", "#e8e8e8"
BATCH = 6  # pictures: three columns of figures, or two of pairs, fill the frame
DRAWN = 64  # edge of the demo model's figures; the workflows save them enlarged
PLOT = 400  # a larger picture is a plot
NEW = "Demo - New character"
# Example workflow -> the demo workflow that it is drawn by, and how far its characters are shifted.
DEMOS = {
    "Demo - Same character": ("Demo - Same character", 0),
    "Demo - Face of one, clothes of another": ("Demo - Face of one, clothes of another", 0),
    "Demo - Two characters": ("Demo - Two characters", 0),
    "Demo - How different the pictures are": ("Demo - How different the pictures are", 0),
    NEW: (NEW, 0),
    "Same character (SD 1.5)": ("Demo - Same character", 20),
    "Same character (SDXL)": ("Demo - Same character", 31),
    "Face of one, clothes of another (SD 1.5)": ("Demo - Face of one, clothes of another", 20),
    "Two characters (SD 1.5)": ("Demo - Two characters", 20),
}


def run(server, node_info: dict, demo: str, shift: int) -> tuple[list[Image.Image], ...]:
    """A demo workflow's references, and its results with plots, as they were drawn; without
    references the base model's pictures in their place."""
    prompt = api_form(example(demo), node_info)
    for key, node in prompt.items():
        if node["class_type"] == "RetrievalPaperdollReference":
            prompt = with_inputs(prompt, key, character=node["inputs"]["character"] + shift)
        if node["class_type"] == "RetrievalPaperdollModel":
            count = 4 if demo == NEW else BATCH
            prompt = with_inputs(prompt, key, batch_size=count)
    # What an earlier workflow showed is cached, and would be missing from this one's results.
    server.post("/free", {"free_memory": True})
    time.sleep(1)
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    references, results, plain = [], [], []
    for key, node in prompt.items():
        if node["class_type"] in ("PreviewImage", "SaveImage"):
            source = prompt[node["inputs"]["images"][0]]["class_type"]
            pictures = [Image.fromarray(picture) for picture in server.images(entry, key)]
            if source == "RetrievalPaperdollReference":
                references += pictures
            elif "without" in node["inputs"].get("filename_prefix", ""):
                plain += [shrink(picture) for picture in pictures]
            else:
                results += [shrink(picture) for picture in pictures]
    return references or plain, results


def shrink(picture: Image.Image) -> Image.Image:
    """A picture in the demo model's own pixels; a plot as it is."""
    if min(picture.size) > PLOT:
        return picture
    scale = picture.height // DRAWN
    return picture.resize(
        (picture.width // scale, picture.height // scale), Image.Resampling.NEAREST
    )


def arrange(pictures: list[Image.Image], width: int, height: int) -> Image.Image:
    """Pictures of one size in a grid, each as large as whole pixels allow; a grid that is full."""
    w, h = pictures[0].size
    best = (0, 0, 0)
    for columns in range(1, len(pictures) + 1):
        rows = -(-len(pictures) // columns)
        across, down = (width - (columns - 1) * GAP) / columns, (height - (rows - 1) * GAP) / rows
        best = max(best, (int(min(across / w, down / h)), len(pictures) % columns == 0, columns))
    scale, _, columns = best
    rows = -(-len(pictures) // columns)
    step = (w * scale + GAP, h * scale + GAP)
    made = Image.new("RGB", (columns * step[0] - GAP, rows * step[1] - GAP), DARK)
    for i, picture in enumerate(pictures):
        scaled = picture.resize((w * scale, h * scale), Image.Resampling.NEAREST)
        made.paste(scaled, (i % columns * step[0], i // columns * step[1]))
    return made


def compose(references: list[Image.Image], results: list[Image.Image], label: str) -> Image.Image:
    """References above, results below, plots beside them, and a label at the bottom."""
    made = Image.new("RGB", (EDGE, EDGE), DARK)
    inside = EDGE - 2 * MARGIN
    plots = [picture for picture in results if min(picture.size) > PLOT]
    drawn = [picture for picture in results if min(picture.size) <= PLOT]
    # Of many references every other one, so that each can be seen.
    above = arrange(references[:: 1 if len(references) <= 4 else 2], inside, 128)
    room = inside - above.height - 2 * GAP - LINE
    below = arrange(drawn[:6] if plots else drawn, inside - (290 if plots else 0), room)
    y = MARGIN
    made.paste(above, ((EDGE - above.width) // 2, y))
    y += above.height + 2 * GAP
    width = below.width + (290 if plots else 0)
    left, top = (EDGE - width) // 2, y + (room - below.height) // 2
    made.paste(below, (left, top))
    for plot in plots[:1]:
        plot.thumbnail((290 - GAP, room), Image.Resampling.LANCZOS)
        made.paste(plot, (left + below.width + GAP, y + (room - plot.height) // 2))
    ImageDraw.Draw(made).line((MARGIN, y - GAP, EDGE - MARGIN, y - GAP), LIGHT, 2)
    write_label(made, label)
    return made


def compose_beside(plain: list[Image.Image], results: list[Image.Image], label: str) -> Image.Image:
    """Four pictures in a column, four larger ones in a square beside it, and a label."""
    made = Image.new("RGB", (EDGE, EDGE), DARK)
    column = arrange(plain, 2 * DRAWN, EDGE - 2 * MARGIN - LINE)
    made.paste(column, (MARGIN, MARGIN))
    left = MARGIN + column.width + 2 * GAP
    edge = (EDGE - MARGIN - left - GAP) // 2
    top = MARGIN + (column.height - 2 * edge - GAP) // 2
    for i, picture in enumerate(results):
        scaled = picture.resize((edge, edge), Image.Resampling.NEAREST)
        made.paste(scaled, (left + i % 2 * (edge + GAP), top + i // 2 * (edge + GAP)))
    write_label(made, label)
    return made


def write_label(made: Image.Image, label: str) -> None:
    where = (EDGE // 2, EDGE - MARGIN - LINE // 3)
    ImageDraw.Draw(made).text(where, label, LIGHT, ImageFont.load_default(19), anchor="mm")


@pytest.mark.skipif(not has_weights(), reason="retrieval_core/paperdoll/weights has no files yet")
@pytest.mark.parametrize("name", DEMOS)
def test_draw(name, server, node_info):
    demo, shift = DEMOS[name]
    references, results = run(server, node_info, demo, shift)
    if name == NEW:
        label = "the demo model: left without, right with Consistent Pictures"
        picture = compose_beside(references, results, label)
    elif name == demo:
        picture = compose(references, results, "above: references, below: drawn by the demo model")
    else:
        label = f"{name[name.index('(') + 1 : -1]} workflow; pictures of the demo model"
        picture = compose(references, results, label)
    picture.save(FOLDER / f"{name}.jpg", quality=90, optimize=True)
    print(f"\nwrote {FOLDER / name}.jpg")
