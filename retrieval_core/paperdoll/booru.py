"""A booru of paper dolls with known truth, to build a data set from and measure what is recovered.

`FOLDER/booru` holds `metadata/posts.json`, one JSON object a line as in Danbooru 2021, and the
pictures in `original/`, half of them with mask, parts and head box beside. `FOLDER/truth.parquet`
tells of every post who drew whom in which outfit, and what is wrong with it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import RetrievalError
from ..files import write_text
from .draw import Rendering, render
from .world import (
    BACKGROUNDS,
    POSES,
    Figure,
    Identity,
    Outfit,
    Scene,
    is_held_out,
    random_identity,
    random_outfit,
    random_scene,
)

# Share of the posts that are to be rejected, by what is wrong with them.
FAULTS = {
    "unwanted tag": 0.03,
    "several characters": 0.03,
    "no character": 0.02,
    "trivial clothes": 0.03,
    "re-encoded copy": 0.02,
    "resized copy": 0.02,
    "brightened copy": 0.02,
    "truncated file": 0.005,
    "empty file": 0.005,
    "missing file": 0.005,
    "only picture": 0.005,
    "unreadable line": 0.001,
}
COPIES = ("re-encoded copy", "resized copy", "brightened copy")
# Faults of a post's tags or file that need a figure of somebody who has other pictures.
SPOILT = [kind for kind in FAULTS if kind not in COPIES and kind != "only picture"]
PLAIN = "plain"

SHARED = 0.1  # of characters, drawn by a second artist too
CHANGES = 0.25  # of outfits, shown once in the very scene of the outfit before
NO_ARTIST = 0.01  # of plain posts, without the artist's tag
ANNOTATED = 0.5  # of posts, with files beside
OUTFITS, PICTURES, CHARACTERS = (1, 4), (4, 9), (6, 14)  # of a role, an outfit, an artist
RESIZED = (48, 96)
BRIGHTENED = 1.08

UNWANTED = ("monochrome", "greyscale", "sketch", "comic")
TRIVIAL = ("shoes", "gloves", "hair_bow", "socks")
NOISE = (
    "1girl", "solo", "blush", "looking_at_viewer", "full_body", "outdoors", "bangs", "chibi",
    "highres", "no_nose", "shadow", "white_outline",
)  # fmt: skip
UPPER_TAGS = {"open jacket": "jacket"}
LOWER_TAGS = {"trousers": "pants", "mini skirt": "miniskirt"}


@dataclass(frozen=True)
class Role:
    """A character as one artist draws it, and scenes that it has not been drawn in yet."""

    character: str
    artist: int
    identity: Identity
    outfits: tuple[Outfit, ...]
    scenes: Iterator[Scene]


@dataclass(frozen=True)
class Post:
    """One picture of the booru.

    figures: who is drawn, from left to right. kind: `PLAIN` or one of `FAULTS`. original: position
    of the post that this one is a copy of. seed: of its noise tags.
    """

    kind: str
    character: str
    artist: int
    outfit: int
    figures: tuple[Figure, ...]
    seed: int
    original: int | None = None


def make_booru(
    folder: Path,
    count: int,
    seed: int = 0,
    alike: float = 0.0,
    annotated: float = ANNOTATED,
    held_out: bool | None = None,
) -> None:
    """Writes a booru of `count` posts; the same for the same arguments.

    alike: share of outfits that differ from another of their character's in their cut and pattern
    only, not in their colours. annotated: share of posts with files beside. held_out: False for
    characters and outfits that `measure` does not use, see `world.is_held_out`.

    Raises RetrievalError if the folder is not empty, or cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if folder.exists() and any(folder.iterdir()):
        raise RetrievalError(f"'{folder}' is not empty; name a new folder.")
    posts = plan_posts(count, seed, alike, held_out)
    # Ids in an order of their own, so that a copy may come before what it is a copy of.
    ids = [1000 + 7 * i for i in np.random.default_rng([seed, 5]).permutation(count).tolist()]
    booru = folder / "booru"
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(partial(_make_post, booru, annotated), posts, ids, chunksize=50))
    made.sort(key=lambda pair: pair[1]["id"])
    write_text(booru / "metadata" / "posts.json", "".join(line + "\n" for line, _ in made))
    truth = [row for _, row in made]
    for row in truth:
        row["copy_of"] = None if row["copy_of"] is None else ids[row["copy_of"]]
    pq.write_table(pa.Table.from_pylist(truth), folder / "truth.parquet")


def plan_posts(
    count: int, seed: int, alike: float = 0.0, held_out: bool | None = None
) -> list[Post]:
    """The posts, those of one role one after the other and the faulty ones last."""
    rng = np.random.default_rng([seed, 4])
    faulty = {kind: round(share * count) for kind, share in FAULTS.items()}
    plain: list[Post] = []
    roles: list[Role] = []
    wanted = count - sum(faulty.values())
    for role in _draw_roles(rng, alike, held_out):
        if len(plain) >= wanted:
            break
        roles.append(role)
        plain += _draw_plain(role, rng)
    del plain[wanted:]
    posts = list(plain)
    for kind in SPOILT:
        for _ in range(faulty[kind]):
            posts.append(_draw_spoilt(kind, roles[int(rng.integers(len(roles)))], rng, held_out))
    for _ in range(faulty["only picture"]):
        role = _draw_role(rng, f"loner_{len(posts):05d}", 0, alike, held_out)
        posts.append(_draw_post("only picture", role, 0, next(role.scenes), rng))
    copied = iter(rng.permutation(wanted).tolist())
    for kind in COPIES:
        for _ in range(faulty[kind]):
            original = next(copied)
            posts.append(replace(plain[original], kind=kind, original=original, seed=_seed(rng)))
    return posts


def _draw_roles(rng: np.random.Generator, alike: float, held_out: bool | None) -> Iterator[Role]:
    """Artist by artist, each with characters of its own and a few of another's."""
    known: list[Role] = []
    for artist in range(10**6):
        earlier = len(known)
        for _ in range(int(rng.integers(*CHARACTERS))):
            # Some tags of boorus look like paths.
            series = "fate/../doll" if len(known) % 20 == 7 else "toybox"
            name, identity = f"doll_{len(known):04d}_({series})", None
            if earlier and rng.random() < SHARED:
                other = known[int(rng.integers(earlier))]
                name, identity = other.character, other.identity
            role = _draw_role(rng, name, artist, alike, held_out, identity)
            if not any((r.character, r.artist) == (name, artist) for r in known[earlier:]):
                known.append(role)
                yield role


def _draw_role(
    rng: np.random.Generator,
    character: str,
    artist: int,
    alike: float,
    held_out: bool | None,
    identity: Identity | None = None,
) -> Role:
    outfits = [random_outfit(rng, held_out)]
    for _ in range(int(rng.integers(OUTFITS[0], OUTFITS[1] + 1)) - 1):
        outfit, last = random_outfit(rng, held_out), outfits[-1]
        while _list_colours(outfit) in map(_list_colours, outfits):
            outfit = random_outfit(rng, held_out)
        if rng.random() < alike and (outfit.upper, outfit.lower) != (last.upper, last.lower):
            dyed = replace(outfit, upper_colour=last.upper_colour, lower_colour=last.lower_colour)
            outfit = dyed if held_out is None or is_held_out(dyed) == held_out else outfit
        outfits.append(outfit)
    # Pictures that share both pose and background would be variants of one picture.
    pairs = list(product(POSES, BACKGROUNDS))
    chosen = [pairs[i] for i in rng.permutation(len(pairs)).tolist()]
    scenes = [
        replace(random_scene(rng), pose=pose, background=background) for pose, background in chosen
    ]
    return Role(
        character, artist, identity or random_identity(rng, held_out), tuple(outfits), iter(scenes)
    )


def _list_colours(outfit: Outfit) -> tuple[str, str]:
    return outfit.upper_colour, outfit.lower_colour


def _draw_plain(role: Role, rng: np.random.Generator) -> Iterator[Post]:
    for outfit in range(len(role.outfits)):
        for number in range(int(rng.integers(PICTURES[0], PICTURES[1] + 1))):
            if number or not outfit or rng.random() >= CHANGES:
                scene = next(role.scenes)
            yield _draw_post(PLAIN, role, outfit, scene, rng)


def _draw_spoilt(kind: str, role: Role, rng: np.random.Generator, held_out: bool | None) -> Post:
    outfit = int(rng.integers(len(role.outfits)))
    post = _draw_post(kind, role, outfit, next(role.scenes), rng)
    if kind == "several characters":
        who, clothes = random_identity(rng, held_out), random_outfit(rng, held_out)
        other = Figure(who, clothes, post.figures[0].scene)
        post = replace(post, figures=(*post.figures, other))
    return post


def _draw_post(kind: str, role: Role, outfit: int, scene: Scene, rng: np.random.Generator) -> Post:
    figure = Figure(role.identity, role.outfits[outfit], scene)
    return Post(kind, role.character, role.artist, outfit, (figure,), _seed(rng))


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _make_post(booru: Path, share: float, post: Post, number: int) -> tuple[str, dict[str, Any]]:
    """Writes a post's files, a share of them annotated; its line of metadata, its row of truth."""
    rng = np.random.default_rng(post.seed)
    extension = "jpg" if post.kind == "re-encoded copy" else "png"
    image = f"original/{number % 1000:04d}/{number}.{extension}"
    path = booru / image
    path.parent.mkdir(parents=True, exist_ok=True)
    renderings = [render(figure) for figure in post.figures]
    picture = _draw_picture(post, renderings, rng)
    content = _encode(picture, post.kind)
    if post.kind != "missing file":
        path.write_bytes(content)
    annotated = post.original is None and len(renderings) == 1 and rng.random() < share
    if annotated:
        _write_beside(path, renderings[0])
    line = json.dumps(_describe(post, number, extension, picture, content, rng))
    row = {
        "id": number,
        "image": image,
        "sha256": hashlib.sha256(content).hexdigest(),
        "kind": post.kind,
        "copy_of": post.original,
        "character": post.character,
        "artist": f"artist_{post.artist:03d}",
        "outfit": post.outfit,
        "annotated": annotated,
        "figure": json.dumps(asdict(post.figures[0])),
    }
    return line[: len(line) // 2] if post.kind == "unreadable line" else line, row


def _draw_picture(
    post: Post, renderings: Sequence[Rendering], rng: np.random.Generator
) -> Image.Image:
    """The figures in the artist's own colours and contrast."""
    manner = np.random.default_rng([post.artist, 6])
    contrast, gains = manner.uniform(0.88, 1.08), manner.uniform(0.94, 1.06, 3)
    pixels = np.concatenate([rendering.image for rendering in renderings], 1)
    pixels = ((pixels - 128.0) * contrast + 128.0) * gains
    if post.kind == "brightened copy":
        pixels = pixels * BRIGHTENED
    picture = Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))
    if post.kind == "resized copy":
        side = RESIZED[int(rng.integers(len(RESIZED)))]
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    return picture


def _encode(picture: Image.Image, kind: str) -> bytes:
    if kind == "empty file":
        return b""
    buffer = io.BytesIO()
    if kind == "re-encoded copy":
        picture.save(buffer, "JPEG", quality=85)
    else:
        picture.save(buffer, "PNG")
    content = buffer.getvalue()
    return content[: len(content) // 2] if kind == "truncated file" else content


def _write_beside(path: Path, rendering: Rendering) -> None:
    Image.fromarray(np.uint8(255) * rendering.mask).save(path.with_suffix(".mask.png"))
    Image.fromarray(rendering.parts).save(path.with_suffix(".parts.png"))
    path.with_suffix(".box.json").write_text(json.dumps(rendering.head_box), encoding="utf-8")


def _describe(
    post: Post,
    number: int,
    extension: str,
    picture: Image.Image,
    content: bytes,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The fields of Danbooru's that say what a picture is."""
    figure = post.figures[0]
    who, clothes, scene = figure.identity, figure.outfit, figure.scene
    seen = [who.hair_style, f"{who.hair_colour} hair", f"{who.eye_colour} eyes", *scene.tags()]
    general = [tag.replace(" ", "_") for tag in seen if rng.random() > 0.1]
    general += rng.choice(NOISE, int(rng.integers(1, 5)), replace=False).tolist()
    if post.kind == "trivial clothes" or rng.random() < 0.3:
        general += rng.choice(TRIVIAL, 2, replace=False).tolist()
    if post.kind != "trivial clothes":
        general.append(UPPER_TAGS.get(clothes.upper, clothes.upper).replace(" ", "_"))
        general.append(LOWER_TAGS.get(clothes.lower, clothes.lower).replace(" ", "_"))
    if post.kind == "unwanted tag":
        general.append(str(rng.choice(UNWANTED)))
    characters = [] if post.kind == "no character" else [post.character]
    if post.kind == "several characters":
        characters.append("doll_guest_(toybox)")
    named = post.kind != PLAIN or rng.random() >= NO_ARTIST
    artists = [f"artist_{post.artist:03d}"] if named else []
    kinds = {
        "general": sorted(set(general)),
        "character": characters,
        "copyright": ["paper_doll"],
        "artist": artists,
        "meta": [],
    }
    return {
        "id": number,
        "created_at": "2021-01-01T00:00:00.000-05:00",
        "score": int(rng.integers(100)),
        "source": "",
        "md5": hashlib.md5(content, usedforsecurity=False).hexdigest(),
        "rating": "s",
        "image_width": picture.width,
        "image_height": picture.height,
        "file_ext": extension,
        "file_size": len(content),
        "is_deleted": False,
        "is_banned": False,
        "tag_string": " ".join(tag for tags in kinds.values() for tag in tags),
        **{f"tag_string_{kind}": " ".join(tags) for kind, tags in kinds.items()},
    }


def read_figure(text: str) -> Figure:
    """The figure of a row of truth."""
    value = json.loads(text)
    scene = value["scene"]
    return Figure(
        Identity(**value["identity"]),
        Outfit(**value["outfit"]),
        Scene(**{**scene, "shift": tuple(scene["shift"])}),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m retrieval_core.paperdoll.booru", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--count", type=int, default=20000, help="posts, the faulty ones included")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other characters")
    parser.add_argument(
        "--alike", type=float, default=0.0,
        help="share of outfits in the same colours as another of their character's",
    )  # fmt: skip
    parser.add_argument(
        "--annotated", type=float, default=ANNOTATED, help="share of posts with files beside"
    )
    parser.add_argument(
        "--disjoint", action="store_true",
        help="without the characters and outfits that paperdoll.measure holds out",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if options.count < 1:
            raise RetrievalError(f"A booru of {options.count} posts is empty; give 1 or more.")
        held_out = False if options.disjoint else None
        make_booru(
            options.out, options.count, options.seed, options.alike, options.annotated, held_out
        )
    except RetrievalError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Wrote {options.count} posts and their truth to {options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
