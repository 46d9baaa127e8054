"""Data sets in the host: its `datasets` folder, building into it, and sheets of what was built."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...retrieval_core.errors import RetrievalError
from .folders import check_inside, split_name
from .loading import make_progress
from .model_folders import fetch_repository

if TYPE_CHECKING:
    from ...retrieval_core.data import DataSet
    from ...retrieval_core.data.annotating import Annotator, Picture

DATASETS = "datasets"
CONNECTED = "connected dataset"  # the choice of the data set that is connected
MARK = "dataset.json"
CACHE = ".cache"  # in the folder of data sets: what models said of pictures, and unfinished builds
PACKAGES = ("pyarrow", "daft", "imagehash", "sklearn", "orjson")


def register() -> None:
    """Makes the folder `datasets` beside models known, which 0.8.0 does not have."""
    home = os.path.join(folder_paths.base_path, DATASETS)
    folder_paths.add_model_folder_path(DATASETS, home)


def list_homes() -> list[Path]:
    """The folders that data sets lie in; new ones are written to the first."""
    return [Path(os.path.abspath(path)) for path in folder_paths.get_folder_paths(DATASETS)]


def list_data_sets() -> list[str]:
    """Names of the data sets, as `name` or `folder/name`."""
    found = set()
    for home in list_homes():
        for mark in (*home.glob(f"*/{MARK}"), *home.glob(f"*/*/{MARK}")):
            found.add(mark.parent.relative_to(home).as_posix())
    return sorted(name for name in found if not any(p.startswith(".") for p in name.split("/")))


def find_data_set(name: str) -> Path:
    """The folder of a data set of `list_data_sets`; RetrievalError if it has gone."""
    for home in list_homes() if name in list_data_sets() else ():
        if (home / name / MARK).is_file():
            return home / name
    raise RetrievalError(
        f"There is no data set '{name}' in the folder {DATASETS}; choose another, or press R to "
        "reload the list."
    )


def find_source(name: str) -> Path:
    """The folder or file that pictures are taken from, in the input folder or that of data sets.

    No other is read, since the workflow that names it may be a stranger's.

    Args:
        name: relative to one of these folders, or the whole path.

    Raises:
        RetrievalError: there is none of this name in them.
    """
    homes = [Path(os.path.abspath(folder_paths.get_input_directory())), *list_homes()]
    for home in homes:
        path = Path(os.path.normpath(home / name.strip()))
        # By its name first, so that no other folder is even asked for.
        inside = home in path.parents and os.path.exists(path)
        if inside and home.resolve() in path.resolve().parents:
            return path
    raise RetrievalError(
        f"There are no pictures '{name}' in the host's input folder or its {DATASETS}; put their "
        f"folder into '{homes[0]}' and give its name, or list the folder it lies in as {DATASETS} "
        "in extra_model_paths.yaml (links that lead elsewhere are not followed)."
    )


def choose_folder(name: str) -> Path:
    """The folder of a data set that is to be built, as `name` or `folder/name`.

    Raises:
        RetrievalError: a name that is empty, has more parts, or leaves the folder of data sets.
    """
    home, parts = list_homes()[0], split_name(name)
    if len(parts) > 2:
        raise RetrievalError(
            f"The data set's name {name!r} has {len(parts)} parts; write it as name or folder/name."
        )
    folder = Path(home, *parts)
    check_inside(home, folder, name)
    return folder


def describe_source(name: str) -> str:
    """Changes when the source's files do, so that the host builds again."""
    from ...retrieval_core.data.sources import find_chunks
    from ...retrieval_core.data.stages import digest_json

    try:
        return digest_json([chunk.stamp for chunk in find_chunks(find_source(name))])
    except RetrievalError:  # told when the node runs
        return ""


def make_choice(name: str) -> io.Combo.Input:
    """The input of that name that chooses a data set, or the connected one; for `choose`."""
    return io.Combo.Input(
        name,
        options=[CONNECTED, *list_data_sets()],
        default=CONNECTED,
        tooltip=f"A data set in the folder {DATASETS}, or the one that is connected.",
    )


def describe_choice(name: str) -> str:
    """Changes when the chosen data set is replaced; the host then looks at it again."""
    from ...retrieval_core.data.data_set import read_info

    if name == CONNECTED:
        return ""
    try:
        return read_info(find_data_set(name))["fingerprint"]
    except RetrievalError:  # told when the node runs
        return ""


def _silence_engine() -> None:
    """Keeps Daft from writing into the host's log."""
    for switch in ("DAFT_PROGRESS_BAR", "DAFT_SHOW_QUERY_ID"):
        os.environ.setdefault(switch, "0")
    logging.getLogger("tracing.span").setLevel(logging.WARNING)


class WatchedAnnotator:
    """An annotator that heeds interruptions before each batch of pictures."""

    def __init__(self, annotator: Annotator) -> None:
        self.annotator = annotator
        self.kind, self.fingerprint = annotator.kind, annotator.fingerprint

    def annotate(self, pictures: list[Picture]) -> list[Any]:
        management.throw_exception_if_processing_interrupted()
        return self.annotator.annotate(pictures)


def build(
    source: str, name: str, outfits: str, copy: bool, models: Mapping[str, str]
) -> tuple[DataSet, dict[str, Any]]:
    """Builds a data set under the node's bar; see `building.build_data_set` for the figures.

    Args:
        models: repositories of the hub by the arguments of `annotators.load_annotators`.

    Raises:
        RetrievalError: a package is missing, see `find_source`, `choose_folder`,
            `load_annotators` and `build_data_set`, or answers were chosen without a VQA model.
    """
    from ...retrieval_core.data import open_data_set
    from ...retrieval_core.data.annotators import load_annotators
    from ...retrieval_core.data.building import build_data_set
    from ...retrieval_core.data.filtering import load_rules
    from ...retrieval_core.errors import import_library

    pictures, folder = find_source(source), choose_folder(name)
    models = {use: repository.strip() for use, repository in models.items() if repository.strip()}
    if outfits == "answers" and "vqa" not in models:
        raise RetrievalError(
            "Outfits by answers need a model that answers; name a VQA repository such as "
            "Salesforce/instructblip-flan-t5-xl, or choose garments."
        )
    _silence_engine()
    for package in PACKAGES:  # all of them before the work starts
        import_library(package, "data")
    folders = {use: str(fetch_repository(repository)) for use, repository in models.items()}
    if folders:
        management.unload_all_models()  # the annotators' models know nothing of the host's
    annotators = [WatchedAnnotator(annotator) for annotator in load_annotators(**folders)]
    progress = make_progress()
    figures = build_data_set(
        [pictures],
        folder,
        rules=load_rules(),
        annotators=annotators,
        outfits=outfits,
        copy=copy,
        cache=list_homes()[0] / CACHE,
        on_progress=lambda _stage, done, total, *_: progress(done, total),
    )
    return open_data_set(folder), figures


def choose(name: str, connected: DataSet | None) -> DataSet:
    """The data set of a name of `list_data_sets`, or for `CONNECTED` the connected one.

    Raises:
        RetrievalError: nothing is connected, or see `open_data_set`.
    """
    from ...retrieval_core.data import open_data_set

    if name != CONNECTED:
        return open_data_set(find_data_set(name))
    if connected is None:
        raise RetrievalError("No data set is connected; connect one, or choose the name of one.")
    return connected


def select_page(data_set: DataSet, page: int) -> DataSet:
    """The pictures of a page of identities, those of one character by one artist, from page 1.

    Raises:
        RetrievalError: there are fewer pages.
    """
    from ...retrieval_core.data.contact_sheet import OUTFITS_EACH, ROWS
    from ...retrieval_core.data.data_set import Groups

    members, size = data_set.identities.members, ROWS // OUTFITS_EACH
    pages = -(-len(members) // size)
    if page > pages:
        raise RetrievalError(
            f"Page {page} was asked for and the data set has {pages}; give 1 to {pages}, or 0 for "
            "characters from all over it."
        )
    rows = np.concatenate(members[(page - 1) * size : page * size])
    index = data_set.index.take(rows)
    counts = {"images": len(rows), "characters": len(index["character"].unique())}
    return replace(
        data_set,
        info={**data_set.info, "counts": counts},
        index=index,
        identities=Groups.collect(data_set.identities.numbers[rows]),
        outfits=Groups.collect(data_set.outfits.numbers[rows]),
        has_head_box=data_set.has_head_box[rows],
    )


def draw_sheet(data_set: DataSet, page: int = 0) -> Tensor:
    """The contact sheet of a page as an IMAGE [1, H, W, 3]; page 0 is spread over the data set.

    Raises:
        RetrievalError: see `select_page` and `draw_contact_sheet`.
    """
    from ...retrieval_core.data.contact_sheet import draw_contact_sheet

    sheet = draw_contact_sheet(select_page(data_set, page) if page else data_set)
    return torch.from_numpy(np.array(sheet))[None].float() / 255


def write_figures(title: str, figures: Mapping[str, Any]) -> str:
    """Figures as text, a line each."""
    from ...retrieval_core.data.data_set import describe_figures

    return "\n".join([title, *map(": ".join, describe_figures(figures).items())])


def give_sheet(sheet: Tensor, report: str, node: type[io.ComfyNode]) -> dict[str, Any]:
    """What the frontend shows on a node: the sheet, and the report below it."""
    return {
        **ui.PreviewImage(sheet, cls=node).as_dict(),
        **ui.PreviewText(report).as_dict(),
    }
