"""Annotations: what lies beside a picture, the cache, and models through transformers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import sentence
from safetensors.torch import load_file, save_file

from retrieval_core.data.annotating import Picture, annotate
from retrieval_core.data.beside import find_beside, is_annotation, read_mask, read_parts

HEIGHT, WIDTH = 30, 20


class Fake:
    """Counts what it is asked."""

    def __init__(self, kind, result, fingerprint="fake 1"):
        self.kind, self.fingerprint = kind, fingerprint
        self.result = result if callable(result) else lambda picture: result
        self.asked: list[Picture] = []

    def annotate(self, pictures):
        self.asked += pictures
        return [self.result(picture) for picture in pictures]


def draw(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def make_mask(top: int = 10) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:] = True
    return mask


def save_mask(path: Path, mask: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return path


def read_rows(folder: Path, names):
    """Rows as the stages before annotation give them."""
    pa = pytest.importorskip("pyarrow")
    rows = []
    for name in names:
        mask, parts, box = find_beside(folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        rows.append(
            dict(root=str(folder), image=name, sha256=digest, width=WIDTH, height=HEIGHT,
                 head_box=box, mask=mask, parts=parts)
        )  # fmt: skip
    types = dict(root=pa.string(), image=pa.string(), sha256=pa.string(), width=pa.int32(),
                 height=pa.int32(), head_box=pa.list_(pa.int32()), mask=pa.string(),
                 parts=pa.string())  # fmt: skip
    return pa.Table.from_pylist(rows, schema=pa.schema(list(types.items())))


def make_fakes():
    return {
        "garment": Fake("garment", lambda p: np.float32([p.mask.mean(), p.head_box[3]])),
        "answer": Fake("answer", "black and pink"),
        "parts": Fake("parts", lambda p: p.mask.astype(np.uint8) * np.uint8(3)),
        "mask": Fake("mask", make_mask(5)),
        "head_box": Fake("head_box", np.array([1, 2, 3, 4])),
    }


def run(rows, fakes, cache):
    return annotate(rows, list(fakes.values()), cache).to_pylist()


def test_what_lies_beside_is_taken_and_models_give_the_rest(tmp_path):
    draw(tmp_path / "a.png"), draw(tmp_path / "b.png", 1)
    save_mask(tmp_path / "a.mask.png", make_mask())
    (tmp_path / "a.box.json").write_text('{"head_box": [2, 1, 9.5, 99]}')
    fakes = make_fakes()
    beside, model = run(read_rows(tmp_path, ["a.png", "b.png"]), fakes, tmp_path / "cache")
    assert beside["mask"] == str(tmp_path / "a.mask.png") and beside["head_box"] == [2, 1, 10, 30]
    np.testing.assert_array_equal(read_mask(model["mask"], WIDTH, HEIGHT), make_mask(5))
    np.testing.assert_array_equal(read_parts(model["parts"], WIDTH, HEIGHT), make_mask(5) * 3)
    assert model["head_box"] == [1, 2, 3, 4]
    # The garment is looked at with either's mask and head box, though it was named first.
    assert beside["garment"] == pytest.approx([20 / 30, 30])
    assert model["garment"] == pytest.approx([25 / 30, 4])
    assert [len(fakes[kind].asked) for kind in ("mask", "head_box", "parts")] == [1, 1, 2]
    assert beside["unusable"] == model["unusable"] == []
    np.testing.assert_array_equal(fakes["mask"].asked[0].image, Image.open(tmp_path / "b.png"))


def test_kinds_without_annotator_stay_null(tmp_path):
    draw(tmp_path / "a.png")
    (row,) = run(read_rows(tmp_path, ["a.png"]), {}, tmp_path / "cache")
    assert [row[kind] for kind in make_fakes()] == [None] * 5
    none = {"mask": Fake("mask", None), "head_box": Fake("head_box", None)}
    for _ in range(2):  # that there is none is cached, too
        (row,) = run(read_rows(tmp_path, ["a.png"]), none, tmp_path / "cache")
        assert row["mask"] is None and row["head_box"] is None
        assert len(none["mask"].asked) == len(none["head_box"].asked) == 1


def test_a_second_run_asks_nothing_and_opens_no_picture(tmp_path):
    names = [f"{i}.png" for i in range(20)]
    for i, name in enumerate(names):
        draw(tmp_path / "pictures" / name, i)
    rows = read_rows(tmp_path / "pictures", names)
    first = run(rows, make_fakes(), tmp_path / "cache")
    shutil.rmtree(tmp_path / "pictures")
    again = make_fakes()
    assert run(rows, again, tmp_path / "cache") == first
    # Chunks and order of the pictures do not matter either.
    assert run(rows.slice(3, 5), again, tmp_path / "cache") == first[3:8]
    assert not any(fake.asked for fake in again.values())


def test_what_changed_is_asked_again(tmp_path):
    draw(tmp_path / "a.png")
    save_mask(tmp_path / "a.mask.png", make_mask())
    rows, cache = read_rows(tmp_path, ["a.png"]), tmp_path / "cache"
    run(rows, make_fakes(), cache)
    save_mask(tmp_path / "a.mask.png", make_mask(20))
    fakes = make_fakes()
    (row,) = run(rows, fakes, cache)
    assert row["garment"][0] == pytest.approx(10 / 30)  # looks at the mask
    assert len(fakes["parts"].asked) == 1 and not fakes["answer"].asked
    fakes["answer"] = Fake("answer", "red", "fake 2")
    assert run(rows, fakes, cache)[0]["answer"] == "red"
    for path in cache.rglob("*.json"):  # a power failure
        path.write_bytes(b"")
    fakes = make_fakes()
    assert run(rows, fakes, cache)[0]["answer"] == "black and pink"
    assert len(fakes["answer"].asked) == 1


def test_unusable_annotations_are_told_and_a_model_takes_their_place(tmp_path):
    for i, name in enumerate("abcd"):
        draw(tmp_path / f"{name}.png", i)
    (tmp_path / "a.mask.png").write_bytes(b"not a picture")
    save_mask(tmp_path / "b.mask.png", make_mask(HEIGHT))  # selects nothing
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "b.parts.png")
    (tmp_path / "c.box.json").write_text("[3, 4]")
    (tmp_path / "d.box.json").write_text("[100, 100, 120, 120]")  # beside the picture
    rows = read_rows(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    found = run(rows, make_fakes(), tmp_path / "cache")
    assert [row["unusable"] for row in found] == [
        ["mask"], ["mask", "parts"], ["head_box"], ["head_box"]
    ]  # fmt: skip
    for row in found:
        assert read_mask(row["mask"], WIDTH, HEIGHT).sum() == 25 * WIDTH
        assert row["head_box"] == [1, 2, 3, 4]
    without = run(rows, {}, tmp_path / "cache")
    assert [row["mask"] or row["head_box"] for row in without] == [None] * 4


def test_masks_are_found_in_a_folder_and_never_by_a_link_out_of_it(tmp_path):
    picture = draw(tmp_path / "set" / "a.png")
    outside = save_mask(tmp_path / "outside.png", make_mask())
    assert find_beside(picture) == (None, None, None)
    (picture.parent / "a.mask.png").symlink_to(outside)
    assert find_beside(picture) == (None, None, None)
    inside = save_mask(picture.parent / "masks" / "a.png", make_mask())
    assert find_beside(picture)[0] == str(inside)
    (picture.parent / "a.box.json").write_text("[1, 2, 3.2, 4]")
    assert find_beside(picture)[2] == (1, 2, 4, 4)
    for text in ("[1, 2, 1, 4]", "[1, 2, 3, NaN]", '{"box": [1, 2, 3, 4]}', "7", "[1, 2, 3"):
        (picture.parent / "a.box.json").write_text(text)
        assert find_beside(picture)[2] is None


def test_annotations_are_no_pictures():
    assert all(map(is_annotation, ("a.mask.png", "x/a.parts.png", "a.box.json", "x/masks/a.png")))
    assert not any(map(is_annotation, ("a.png", "mask.png", "masks.png", "x/masked/a.png")))


def test_masks_of_another_size_are_resized(tmp_path):
    big = np.zeros((60, 40), bool)
    big[20:] = True
    path = save_mask(tmp_path / "m.png", big)
    np.testing.assert_array_equal(read_mask(path, WIDTH, HEIGHT), make_mask())
    save_mask(path, np.zeros((30, 20), bool))
    assert "selects nothing" in sentence(read_mask, path, WIDTH, HEIGHT)
    palette = Image.fromarray(np.full((30, 20), 7, np.uint8), "P")
    palette.putpalette([0, 0, 0] * 256)
    palette.save(path)
    assert (read_parts(path, WIDTH, HEIGHT) == 7).all()


# Models.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("transformers")
    import tiny_detectors
    import tiny_models

    made = {}

    def make(name: str) -> Path:
        if name not in made:
            maker = getattr(tiny_detectors, f"make_{name}", None)
            maker = maker or getattr(tiny_models, f"make_{name}")
            made[name] = maker(tmp_path_factory.mktemp(name))
        return made[name]

    return make


def make_pictures():
    """Of several shapes."""
    rng = np.random.default_rng(3)
    shapes = [(40, 48), (64, 30), (50, 50), (33, 80)]
    return [
        Picture(rng.integers(0, 256, (*shape, 3), dtype=np.uint8), str(i))
        for i, shape in enumerate(shapes)
    ]


def pad(image: np.ndarray, size: int) -> Image.Image:
    from retrieval_core.data.prepare import pad_to_square

    return Image.fromarray(pad_to_square(image, None, size)[0])


def find_by_hand(folder: Path, image: np.ndarray, text: str, threshold: float):
    """The best box from the model's raw output, one picture at a time."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=pad(image, 800), text=[[text]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    scores = outputs.logits[0].sigmoid().amax(-1)
    if scores.max() <= threshold:
        return None
    x, y, w, h = outputs.pred_boxes[0, scores.argmax()].tolist()
    height, width = image.shape[:2]
    side = max(height, width)
    left, top = (side - width) / 2, (side - height) / 2
    edges = ((x - w / 2) * side - left, (y - h / 2) * side - top,
             (x + w / 2) * side - left, (y + h / 2) * side - top)  # fmt: skip
    limits = (width, height) * 2
    box = tuple(min(max(round(edge), 0), limit) for edge, limit in zip(edges, limits))
    return box if box[0] < box[2] and box[1] < box[3] else None


@pytest.mark.parametrize(("name", "threshold"), [("grounding_dino", 0.25), ("owlv2", 0.1)])
def test_head_boxes_are_the_best_scored_of_the_picture(folders, name, threshold, monkeypatch):
    from retrieval_core.data import annotators

    monkeypatch.setattr(annotators, "BATCH", 3)
    detector = annotators.HeadDetector(folders(name))
    pictures = make_pictures()
    found = detector.annotate(pictures)
    assert found == [
        find_by_hand(folders(name), picture.image, "a head", threshold) for picture in pictures
    ]
    assert len(set(found) - {None}) > 1
    # Alone or with others, so that a run that was killed goes on as it would have.
    assert [detector.annotate([picture])[0] for picture in pictures] == found


def test_masks_are_sams_in_the_figures_box(folders):
    from transformers import SamModel, SamProcessor

    from retrieval_core.data.annotators import FigureSegmenter

    pictures = make_pictures()
    folder = folders("sam")
    masks = FigureSegmenter(folders("owlv2"), folder).annotate(pictures)
    model, processor = SamModel.from_pretrained(folder).eval(), SamProcessor.from_pretrained(folder)
    boxes = [find_by_hand(folders("owlv2"), p.image, "a person", 0.1) for p in pictures]
    assert sum(box is not None for box in boxes) > 1
    for picture, box, mask in zip(pictures, boxes, masks):
        if box is None:
            assert mask is None
            continue
        image = Image.fromarray(picture.image)
        inputs = processor(image, input_boxes=[[list(map(float, box))]], return_tensors="pt")
        with torch.no_grad():
            logits = model(
                pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"],
                multimask_output=False,
            ).pred_masks[0]  # fmt: skip
        # The logits cover the padded square; the picture is its upper left part.
        whole = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear")
        height, width = inputs["reshaped_input_sizes"][0].tolist()
        shape = picture.image.shape[:2]
        shown = torch.nn.functional.interpolate(whole[..., :height, :width], shape, mode="bilinear")
        assert mask.dtype == bool and mask.shape == shape
        np.testing.assert_array_equal(mask, (shown[0, 0] > 0).numpy())


def test_parts_are_clipsegs_best_prompt_inside_the_mask(folders):
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    from retrieval_core.data.annotators import PARTS, PartSegmenter

    folder = folders("clipseg")
    (picture,) = make_pictures()[:1]
    (parts,) = PartSegmenter(folder).annotate([picture])
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    processor = CLIPSegProcessor.from_pretrained(folder)
    maps = []
    for text in PARTS:
        image = Image.fromarray(picture.image)
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits.reshape(1, 1, 32, 32)
        maps.append(torch.nn.functional.interpolate(logits, (40, 48), mode="bilinear")[0, 0])
    best = torch.stack([torch.zeros(40, 48), *maps]).argmax(0).numpy()
    assert parts.dtype == np.uint8 and (parts != best).mean() < 1e-3  # ties of the last bits
    assert len(np.unique(parts)) == len(PARTS) + 1
    mask = np.zeros((40, 48), bool)
    mask[:, :20] = True
    (cut,) = PartSegmenter(folder).annotate([Picture(picture.image, "", mask)])
    np.testing.assert_array_equal(cut, np.where(mask, parts, 0))


def test_answers_are_the_vqa_models(folders):
    from retrieval_core.data.annotators import ClothesAnswerer
    from retrieval_core.data.outfits import QUESTION
    from retrieval_core.metrics.vqa_models import load_vqa

    pictures = make_pictures()
    answers = ClothesAnswerer(folders("blip")).annotate(pictures)
    vqa = load_vqa(folders("blip"), max_new_tokens=32)
    for picture, answer in zip(pictures, answers):
        square = torch.from_numpy(np.array(pad(picture.image, 512))).permute(2, 0, 1) / 255
        assert [answer] == vqa.answer(square[None], QUESTION)
    assert len(set(answers)) > 1


def test_models_are_loaded_by_name_and_only_when_asked(folders, tmp_path, monkeypatch):
    from retrieval_core.data import annotators

    loads = []
    monkeypatch.setattr(annotators, "load_model", lambda *a: loads.append(a))
    names = [str(folders(name)) for name in ("owlv2", "sam", "clipseg", "blip")]
    found = annotators.load_annotators(*names)
    assert [one.kind for one in found] == ["head_box", "mask", "parts", "answer"] and not loads
    assert len({one.fingerprint for one in found}) == 4
    refused = sentence(annotators.load_annotators, segmenter="facebook/sam-vit-base")
    assert "facebook/sam-vit-base" in refused and "name a detector" in refused
    assert "'clipseg' and finds no boxes" in sentence(annotators.HeadDetector, folders("clipseg"))
    wrong = sentence(annotators.FigureSegmenter, folders("owlv2"), folders("owlv2"))
    assert "'owlv2' and finds no masks" in wrong
    assert "'sam' and finds no parts" in sentence(annotators.PartSegmenter, folders("sam"))


def test_fingerprints_tell_weights_and_settings_apart(folders, tmp_path):
    from retrieval_core.data.annotators import fingerprint_model

    first = fingerprint_model(folders("sam"))
    copy = Path(shutil.copytree(folders("sam"), tmp_path / "sam"))
    assert fingerprint_model(copy) == first
    weights = load_file(copy / "model.safetensors")
    name = next(name for name, values in weights.items() if values.dim() > 1)
    save_file({**weights, name: weights[name] + 1e-3}, copy / "model.safetensors", {"format": "pt"})
    assert fingerprint_model(copy) != first
    shutil.copy(folders("sam") / "model.safetensors", copy)
    assert fingerprint_model(copy) == first
    config = copy / "preprocessor_config.json"
    config.write_text(config.read_text().replace("0.485", "0.5"))
    assert fingerprint_model(copy) != first
    (copy / "model.safetensors").write_bytes(b"torn")
    assert "not a whole safetensors file" in sentence(fingerprint_model, copy)
