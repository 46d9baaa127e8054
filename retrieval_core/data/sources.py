"""Sources of tagged pictures: Danbooru metadata, gallery-dl, kohya, plain folders, WebDataset.

A source is split into chunks, and a chunk is read into rows on its own, on any machine that sees
the source under the same path. Nothing of a source is written.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RetrievalError, explain, import_library
from .beside import MASKS_FOLDER, find_beside, is_annotation
from .filtering import Rules, find_rejection, normalize_tag

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = {"png", "jpg", "jpeg", "webp", "bmp", "gif", "avif", "tif", "tiff"}
CAPTIONS = (".txt", ".caption")
CHUNK_BYTES, CHUNK_FILES, BATCH_ROWS = 64 << 20, 1024, 2048

# Reasons of rejection, beside those of `filtering.find_rejection`.
UNREADABLE = "unreadable metadata"
NO_METADATA = "no metadata"
NOT_A_PICTURE = "not a picture"
OUTSIDE = "outside of the source's folder"
TWICE = "two pictures of one name"

COLUMNS = (
    "root", "image", "tags", "character", "artist", "caption", "head_box", "mask", "parts",
    "source", "licence",
)  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A part of a source that is read in one go; plain JSON values.

    kind: danbooru2019, danbooru2021, gallery-dl, kohya, folders or webdataset.
    root: absolute path of the folder that the pictures' paths are relative to, or of their shard.
    path, start, stop: a metadata file and the bytes in which the chunk's lines begin (danbooru).
    layout: format of a picture's path from bucket, id and extension (danbooru).
    files: the pictures' paths (gallery-dl, kohya, folders).
    stamp: digest of names, sizes and times of the files that the rows are read from, so that a
    result that was stored under a digest of the chunk is not taken for that of a changed source.
    """

    kind: str
    root: str
    path: str = ""
    start: int = 0
    stop: int = 0
    layout: str = ""
    files: Sequence[str] = ()
    stamp: str = ""


class Post(NamedTuple):
    """What is told of a picture.

    tags: the general ones, or None if the source has none. meta: other tags that may be unwanted.
    """

    tags: list[str] | None
    characters: list[str]
    artists: list[str]
    meta: Sequence[str] = ()
    caption: str | None = None
    licence: str | None = None


def make_schema() -> pa.Schema:
    """Columns and types of the rows."""
    pa = import_library("pyarrow", "data")
    types = dict.fromkeys(COLUMNS, pa.string())
    types |= {"tags": pa.list_(pa.string()), "head_box": pa.list_(pa.int32())}
    return pa.schema(list(types.items()))


def find_chunks(source: Path) -> list[Chunk]:
    """Detects what kind of source a path is and splits it.

    In this order: `.json` or `.jsonl` files with a post a line, in the folder or its `metadata/`,
    are Danbooru's, with pictures in `original/` or `512px/`, else beside, as
    `<id % 1000, four digits>/<id>.<extension>` or flat. Files `.tar` are WebDataset shards.
    Pictures with `<name>.<extension>.json` beside are gallery-dl's. Pictures in folders named
    `<repeats>_<character>` are kohya's. Otherwise the folders are `<character>/` or
    `<character>/<artist>/`, and a picture in none is of a character named as the source. A path may
    also name one metadata file or one shard.

    Raises:
        RetrievalError: nothing is there, or no pictures.
    """
    import_library("orjson", "data")
    source = source.absolute()
    if not source.exists():
        raise RetrievalError(f"There is no source '{source}'; check the path.")
    if source.suffix == ".tar":
        return _split_shards([source])
    if source.is_file():
        if not _detect_posts(source):
            raise RetrievalError(
                f"'{source}' is not Danbooru metadata, which has one JSON object a line (a list "
                "in one is split by jq -c '.[]'); name such a file, a .tar shard or a folder."
            )
        return _split_metadata([source])
    metadata = [path for path in _list_metadata(source) if _detect_posts(path)]
    if metadata:
        return _split_metadata(metadata)
    files = _list_files(source)
    shards = [source / path for path in files if path.endswith(".tar")]
    if shards:
        return _split_shards(shards)
    return _split_files(source, files)


def read_chunk(chunk: Chunk, rules: Rules) -> tuple[pa.Table, dict[str, int]]:
    """The rows of the pictures that stay, and of the others how many were rejected by reason.

    Together they are all that were seen: lines of metadata, or pictures in folders or shards. That
    a picture of a Danbooru line is there is not checked.
    """
    pa = import_library("pyarrow", "data")
    schema, batches = make_schema(), []
    rejected: Counter[str] = Counter()
    kept = _keep_rows(chunk, rules, rejected)
    # In batches, since Python's garbage collector goes through all lists that are alive.
    while rows := list(islice(kept, BATCH_ROWS)):
        arrays = [pa.array(values, field.type) for values, field in zip(zip(*rows), schema)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema), dict(sorted(rejected.items()))


def _keep_rows(chunk: Chunk, rules: Rules, rejected: Counter[str]) -> Iterator[tuple[Any, ...]]:
    read = _read_metadata if chunk.layout else _read_files if chunk.files else _read_shard
    # Looking for each picture's files would take as long as all the rest of a line.
    annotated = lru_cache(maxsize=None)(partial(_holds_annotations, chunk.root))
    for image, post in read(chunk):
        reason = post if isinstance(post, str) else _find_reason(chunk, image, post, rules)
        if reason:
            rejected[reason] += 1
        else:
            yield _make_row(chunk, image, post, annotated(image.rpartition("/")[0]))


def parse_post(value: dict[str, Any]) -> Post:
    """What a JSON object tells of a picture: of Danbooru, of gallery-dl's sites, or a caption's.

    Raises ValueError, TypeError, KeyError or AttributeError for values that it cannot be.
    """
    kinds = _split_kinds(value)
    caption, licence = value.get("caption"), value.get("license") or value.get("licence")
    return Post(
        kinds["general"],
        kinds["character"],
        kinds["artist"],
        kinds["meta"],
        caption if isinstance(caption, str) else None,
        licence if isinstance(licence, str) else None,
    )


KINDS = ("general", "character", "artist", "meta")
_TEXTS = {kind: f"tag_string_{kind}" for kind in KINDS}
_CATEGORIES = {"0": "general", "1": "artist", "4": "character", "5": "meta"}


def _split_kinds(value: dict[str, Any]) -> dict[str, list[str]]:
    tags = value.get("tags")
    if "tag_string_general" in value:  # Danbooru from 2020, and gallery-dl of it
        return {kind: (value.get(text) or "").split() for kind, text in _TEXTS.items()}
    if any(f"tags_{kind}" in value for kind in KINDS):  # gallery-dl of other sites
        return {kind: _split_tags(value.get(f"tags_{kind}")) for kind in KINDS}
    if isinstance(tags, dict):  # gallery-dl of e621
        return {kind: _split_tags(tags.get(kind)) for kind in KINDS}
    if isinstance(tags, list) and tags and isinstance(tags[0], dict):  # Danbooru until 2019
        kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for tag in tags:
            kind = _CATEGORIES.get(str(tag["category"]))
            if kind:
                kinds[kind] += _split_tags([tag["name"]])
        return kinds
    characters, artists = value.get("character"), value.get("artist")
    return {
        "general": _split_tags(tags),
        "character": _split_tags([characters] if isinstance(characters, str) else characters),
        "artist": _split_tags([artists] if isinstance(artists, str) else artists),
        "meta": [],
    }


def _split_tags(tags: Any) -> list[str]:
    if isinstance(tags, str):
        return [tag.strip() for tag in tags.split(",")] if "," in tags else tags.split()
    if not all(isinstance(tag, str) for tag in tags or ()):
        raise TypeError("a tag is not text")
    return list(tags or ())


def split_caption(text: str) -> list[str] | None:
    """The tags of a caption, or None if it is prose, or empty.

    Tags are set off by commas and short; prose has full stops or a part of more than five words.
    """
    parts = [part.strip() for part in text.replace("\n", ",").split(",")]
    parts = [part for part in parts if part]
    prose = text.rstrip().endswith(".") or any(len(part.split()) > 5 for part in parts)
    return None if prose or not parts else parts


def read_picture(root: str, image: str) -> bytes:
    """The content of a row's picture: a file of a folder, or a member of a shard.

    Raises OSError if it cannot be read.
    """
    path, start, size = f"{root}/{image}", 0, -1
    if root.endswith(".tar") and os.path.isfile(root):
        index = _index_shard(root, os.stat(root).st_mtime_ns)
        if image not in index:
            raise FileNotFoundError(f"{image} is not in {root}")
        path, (start, size) = root, index[image]
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


@lru_cache(maxsize=4)
def _index_shard(path: str, _changed: int) -> dict[str, tuple[int, int]]:
    """Where each member of a shard is in it: offset and size in bytes."""
    index: dict[str, tuple[int, int]] = {}
    with suppress(tarfile.TarError, EOFError), tarfile.open(path) as shard:  # up to where it is cut
        for member in shard:
            index.setdefault(member.name, (member.offset_data, member.size))
    return index


def _read_metadata(chunk: Chunk) -> Iterator[tuple[str, Post | str]]:
    with open(chunk.path, "rb") as file:
        position = chunk.start
        if position:  # a line that runs across the start is the previous chunk's
            file.seek(position - 1)
            position += len(file.readline()) - 1
        for line in file if position < chunk.stop else ():
            if not line.isspace():
                yield _read_line(line, chunk.layout)
            position += len(line)
            if position >= chunk.stop:
                break


def _read_line(line: bytes, layout: str) -> tuple[str, Post | str]:
    import orjson

    try:
        value = orjson.loads(line)
        number, extension = int(value["id"]), value["file_ext"]
        post = parse_post(value)
        if extension not in PICTURES:
            return "", NOT_A_PICTURE
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", UNREADABLE
    return layout.format(bucket=number % 1000, id=number, extension=extension), post


def _read_files(chunk: Chunk) -> Iterator[tuple[str, Post | str]]:
    read = _read_sidecar if chunk.kind == "gallery-dl" else _read_captioned
    for image in chunk.files:
        try:
            yield image, OUTSIDE if _leads_out(chunk.root, image) else read(chunk, image)
        except (ValueError, TypeError, KeyError, AttributeError, OSError):
            yield image, UNREADABLE


def _read_sidecar(chunk: Chunk, image: str) -> Post | str:
    import orjson

    text = _read_beside(chunk, image + ".json")
    return NO_METADATA if text is None else parse_post(orjson.loads(text))


def _read_captioned(chunk: Chunk, image: str) -> Post | str:
    """A picture whose folder names its character, unless a JSON caption does."""
    import orjson

    stem = image.rpartition(".")[0]
    text = _read_beside(chunk, stem + ".json")
    if text is not None:
        value = orjson.loads(text)
        post = parse_post({"caption": value} if isinstance(value, str) else value)
    else:
        texts = (_read_beside(chunk, stem + suffix) for suffix in CAPTIONS)
        text = next((text for text in texts if text is not None), b"")
        post = Post(None, [], [], caption=text.decode("utf-8-sig").strip() or None)
    character, artist = _name_folders(chunk, image)
    return Post(
        post.tags or split_caption(post.caption or ""),
        post.characters or [character],
        post.artists or ([artist] if artist else []),
        post.meta,
        post.caption,
        post.licence,
    )


def _name_folders(chunk: Chunk, image: str) -> tuple[str, str | None]:
    """Character and artist by the folders that a picture is in."""
    folders = image.split("/")[:-1] or [Path(chunk.root).name]
    if chunk.kind == "kohya":
        return re.sub(r"^\d+_", "", folders[-1]), None
    return folders[0], folders[1] if len(folders) > 1 else None


def _read_beside(chunk: Chunk, path: str) -> bytes | None:
    """A text file of the source, or None if it is missing or a link leads out of the folder."""
    whole = f"{chunk.root}/{path}"
    if not os.path.isfile(whole) or _leads_out(chunk.root, path):
        return None
    with open(whole, "rb") as file:
        return file.read()


def _read_shard(chunk: Chunk) -> Iterator[tuple[str, Post | str]]:
    """The samples of a shard: members beside each other of one name up to its first dot."""
    seen = set()
    try:
        with tarfile.open(chunk.root) as shard:
            for _, group in groupby(shard, lambda member: _split_name(member)[0]):
                members = list(group)
                sample = {_split_name(member)[1]: member for member in members}
                for member in members:
                    if _split_name(member)[1] in PICTURES:
                        twice = member.name in seen
                        seen.add(member.name)
                        post = TWICE if twice else _read_sample(shard, sample, member)
                        yield _as_text(member.name), post
    except (tarfile.TarError, OSError, EOFError):
        yield "", UNREADABLE


def _split_name(member: tarfile.TarInfo) -> tuple[str, str]:
    folder, slash, name = member.name.rpartition("/")
    key, _, extension = name.partition(".")
    return folder + slash + key, extension.lower()


def _read_sample(
    shard: tarfile.TarFile, sample: dict[str, tarfile.TarInfo], picture: tarfile.TarInfo
) -> Post | str:
    import orjson

    if not picture.isfile() or picture.name.startswith("/") or ".." in picture.name.split("/"):
        return OUTSIDE
    try:
        if "json" in sample:
            return parse_post(orjson.loads(_read_member(shard, sample["json"])))
        if "txt" not in sample:
            return NO_METADATA
        caption = _read_member(shard, sample["txt"]).decode("utf-8-sig").strip()
        return Post(split_caption(caption), [], [], caption=caption)
    except (ValueError, TypeError, KeyError, AttributeError):
        return UNREADABLE


def _read_member(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a file")
    return file.read()


def _find_reason(chunk: Chunk, image: str, post: Post, rules: Rules) -> str | None:
    tags = post.tags
    if tags is not None:
        tags = [*tags, *post.meta]
        if not chunk.layout:
            tags = [normalize_tag(tag) for tag in tags]
    reason = find_rejection(tags, post.characters, rules)
    return OUTSIDE if not reason and chunk.layout and _leads_out(chunk.root, image) else reason


def _leads_out(root: str, path: str) -> bool:
    """Whether a symbolic link in a file's path below the root leads out of it."""
    folder, _, _ = path.rpartition("/")
    linked = os.path.islink(f"{root}/{path}")
    return _resolves_out(root, path) if linked else _folder_leads_out(root, folder)


def _resolves_out(root: str, path: str) -> bool:
    return not Path(root, path).resolve().is_relative_to(Path(root).resolve())


_folder_leads_out = lru_cache(maxsize=4096)(_resolves_out)


def _make_row(chunk: Chunk, image: str, post: Post, annotated: bool) -> tuple[Any, ...]:
    beside = find_beside(Path(chunk.root, image)) if annotated else (None, None, None)
    mask, parts, head_box = beside
    artist = post.artists[0] if len(post.artists) == 1 else None
    return (
        chunk.root, image, post.tags or [], post.characters[0], artist, post.caption, head_box,
        mask, parts, chunk.kind, post.licence,
    )  # fmt: skip


def _holds_annotations(root: str, folder: str) -> bool:
    """Whether `find_beside` may find anything for the pictures of a folder."""
    path = f"{root}/{folder}"
    try:
        return _lists_annotations(path, os.stat(path).st_mtime_ns)
    except OSError:
        return False


@lru_cache(maxsize=4096)
def _lists_annotations(folder: str, _changed: int) -> bool:
    """Of a folder with that time of change, which new entries move."""
    return any(name == MASKS_FOLDER or is_annotation(name) for name in os.listdir(folder))


def _split_metadata(paths: Sequence[Path]) -> list[Chunk]:
    chunks = []
    for path in paths:
        root = path.parent.parent if path.parent.name == "metadata" else path.parent
        name = next((name for name in ("original", "512px") if (root / name).is_dir()), "")
        with os.scandir(root / name) as entries:
            folders = sorted(entry.path for entry in entries if entry.is_dir())
        layout = _choose_layout(name, folders)
        kind, stamp = _detect_posts(path) or "", _stamp([str(path), str(root / name), *folders])
        size = path.stat().st_size
        for start in range(0, size, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, size)
            chunks.append(Chunk(kind, str(root), str(path), start, stop, layout, stamp=stamp))
    return chunks


def _choose_layout(name: str, folders: Sequence[str]) -> str:
    """The format of a picture's path, by the name of the pictures' folder and those in it."""
    bucketed = any(re.fullmatch(r"\d{4}", os.path.basename(folder)) for folder in folders)
    layout = (f"{name}/" if name else "") + ("{bucket:04d}/" if bucketed else "")
    return layout + ("{id}.jpg" if name == "512px" else "{id}.{extension}")


def _list_metadata(source: Path) -> list[Path]:
    """Files that may hold a post a line, not those that tell of a picture of their name."""
    found = []
    for folder in (source, source / "metadata"):
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        for name in sorted(names):
            stem, _, suffix = name.rpartition(".") if "." in name else (name, "", "")
            told = any(f"{stem}.{extension}" in names for extension in PICTURES)
            sidecar = stem.rpartition(".")[2].lower() in PICTURES
            if suffix in ("", "json", "jsonl") and not told and not sidecar:
                found.append(folder / name)
    return [path for path in found if path.is_file()]


def _detect_posts(path: Path) -> str | None:
    """The kind of Danbooru metadata in a file, or None if it holds no post."""
    import orjson

    try:
        with open(path, "rb") as file:
            lines = file.read(1 << 20).splitlines()
    except OSError as error:
        raise RetrievalError(
            f"'{path}' cannot be read ({explain(error)}); check its permissions."
        ) from error
    for line in lines:
        with suppress(ValueError):
            value = orjson.loads(line)
            if isinstance(value, dict) and {"id", "file_ext"} <= value.keys():
                return "danbooru2021" if "tag_string_general" in value else "danbooru2019"
    return None


def _split_shards(paths: Iterable[Path]) -> list[Chunk]:
    return [Chunk("webdataset", str(path), stamp=_stamp([str(path)])) for path in paths]


def _split_files(source: Path, files: Sequence[str]) -> list[Chunk]:
    pictures = [path for path in files if _is_picture(path) or path.endswith("/")]
    if not any(map(_is_picture, pictures)):
        raise RetrievalError(
            f"There are no pictures in '{source}'; name a folder with pictures, Danbooru metadata "
            "or .tar shards."
        )
    kind, known = "folders", set(files)
    if any(f"{path}.json" in known for path in pictures):
        kind = "gallery-dl"
    elif any(re.match(r"\d+_.", Path(source, path).parent.name) for path in pictures):
        kind = "kohya"
    stamp = _stamp([f"{source}/{path}" for path in files])
    pictures = [_as_text(path) for path in pictures]
    return [
        Chunk(kind, str(source), files=pictures[start : start + CHUNK_FILES], stamp=stamp)
        for start in range(0, len(pictures), CHUNK_FILES)
    ]


def _is_picture(path: str) -> bool:
    return path.rpartition(".")[2].lower() in PICTURES and not is_annotation(path)


def _list_files(source: Path) -> list[str]:
    """Relative paths of all files, sorted, without hidden ones.

    Linked folders are not entered; those that lead out are listed, with a slash behind.
    """
    found = []
    for folder, names, files in os.walk(source):
        below = "" if Path(folder) == source else Path(folder).relative_to(source).as_posix() + "/"
        names[:] = [name for name in names if not name.startswith(".")]
        found += [below + name for name in files if not name.startswith(".")]
        linked = [below + name for name in names if os.path.islink(f"{folder}/{name}")]
        found += [f"{path}/" for path in linked if _resolves_out(str(source), path)]
    return sorted(found)


def _as_text(path: str) -> str:
    """A path that is not UTF-8, as text; no file is found by it."""
    return path.encode(errors="backslashreplace").decode()


def _stamp(paths: Iterable[str]) -> str:
    """A digest of files' paths, sizes and times of change."""
    digest = hashlib.sha256()
    for path in paths:
        found = os.lstat(path)
        digest.update(f"{_as_text(path)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()
