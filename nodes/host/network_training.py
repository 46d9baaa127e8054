"""Training a network in the host: the node's settings, its bar and preview, interruption, files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...retrieval_core.data import DataSet
from ...retrieval_core.data.stages import digest_json
from ...retrieval_core.files import write_text
from ...retrieval_core.network.controlnet import NATIVE_SIZE
from ...retrieval_core.training.latent_cache import fingerprint_index
from ...retrieval_core.training.run_config import RunConfig
from ...retrieval_core.training.single_device import SingleDevice
from ...retrieval_core.training.training_run import train
from .dataset_folder import CACHE, list_homes
from .folders import NETWORKS, choose_path, first_path
from .graph_base import make_base
from .trained_network import TrainedNetwork, load_network

# Settings that the node calls otherwise than `RunConfig`; None where it has none.
_NAMES = {"size": "resolution", "checkpoint_activations": "save_memory", "optimizer": None}
_LOSSES = "losses.json"  # in the run's folder
_PREVIEW = 512  # largest edge in pixels


class NodeConfig(RunConfig):
    """A run's settings by the names that the node gives them in sentences."""

    def name_setting(self, field: str) -> str | None:
        return _NAMES.get(field, field)


class HostWatcher:
    """A `Watcher` with the node's bar, a preview of the newest sheet, and the host's interruption.

    Attributes:
        losses: of each step, also of those before an interruption.
        sheet: the newest one, as an IMAGE [1, H, W, 3].
        wants_stop: see `Watcher`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[float] = []
        self.sheet: Tensor | None = None
        self._stopped = False

    def show_caching(self, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        comfy.utils.ProgressBar(total).update_absolute(done)

    @contextmanager
    def follow(self, step: int, steps: int) -> Iterator[None]:
        earlier = self.folder / _LOSSES
        if earlier.is_file():
            self.losses = json.loads(earlier.read_text())[:step]
        self._bar = comfy.utils.ProgressBar(steps)
        try:
            yield
        finally:
            write_text(earlier, json.dumps(self.losses))

    @property
    def wants_stop(self) -> bool:
        self._stopped = self._stopped or management.processing_interrupted()
        return self._stopped

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        self.losses.append(losses["loss"])
        self._move(step)

    def show_sheet(self, path: Path) -> None:
        with Image.open(path) as picture:
            shown = picture.convert("RGB")
        self.sheet = torch.from_numpy(np.array(shown))[None].float() / 255
        self._move(len(self.losses), ("JPEG", shown, _PREVIEW))

    def _move(self, step: int, preview: Any = None) -> None:
        """Moves the bar, which takes up an interruption: it waits until the step is saved."""
        try:
            self._bar.update_absolute(step, preview=preview)
        except management.InterruptProcessingException:
            self._stopped = True


def choose_precision(device: torch.device) -> str:
    """The precision of training that a device is good at."""
    if management.is_device_cpu(device):
        return "float32"
    if management.should_use_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "float32"


class Training(NamedTuple):
    """A finished training.

    losses: of each step. file: its name in models/retrieval_controlnet. report: what the run told,
    a line each. sheet: the last one, an IMAGE [1, H, W, 3], or None.
    """

    network: TrainedNetwork
    losses: list[float]
    file: str
    report: str
    sheet: Tensor | None


def train_network(
    model: Any, vae: Any, clip: Any, data_set: DataSet, name: str, **settings: Any
) -> Training:
    """Trains a network on the graph's models, or goes on with the same run that was interrupted.

    Args:
        name: of the file in models/retrieval_controlnet; a number is added.
        settings: of `RunConfig`; size 0 is the base's own.

    Raises:
        InterruptProcessingException: as the host's nodes do, after the work is saved.
        RetrievalError: an unsafe name, or see `make_base`, `RunConfig` and `train`.
    """
    path = choose_path(NETWORKS, name)
    device = management.get_torch_device()
    with torch.inference_mode(False):
        base = make_base(model, vae, clip)
        settings["size"] = settings["size"] or NATIVE_SIZE[base.name]
        home = list_homes()[0] / CACHE
        config = NodeConfig(
            base=Path(base.name),
            data=data_set.folder,
            out=home,
            network=path,
            precision=choose_precision(device),
            cache=home / "latents",
            keep_checkpoints=1,
            workers=0,  # processes could not import the pack under the name that the host gives it
            **settings,
        )
        run = [config.list_fixed(), config.batch_size * config.accumulate, base.fingerprint]
        key = digest_json([*run, fingerprint_index(data_set)])[:16]
        config = replace(config, out=home / "runs" / f"{data_set.folder.name}-{key}")
        watcher = HostWatcher(config.out)
        management.unload_all_models()  # training's own copies know nothing of the host's
        single = SingleDevice(device, config)
        done = train(config, base, single, watcher)
        del base
        management.soft_empty_cache()
    if done is None:
        management.interrupt_current_processing(False)
        raise management.InterruptProcessingException
    shutil.rmtree(config.out)
    name = path.relative_to(Path(first_path(NETWORKS)).absolute()).as_posix()
    report = "\n".join([*single.told, f"Saved as {name}."])
    return Training(load_network(path, model), watcher.losses, name, report, watcher.sheet)
