"""Train Retrieval ControlNet: from a data set to a network for the graph's base model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..retrieval_core.errors import RetrievalError
from .host import dataset_folder, folders
from .host.dataset_folder import CONNECTED
from .socket_types import (
    ADVANCED,
    CATEGORY,
    RetrievalControlNetType,
    RetrievalDatasetType,
    find_refusal,
    make_schema,
)

BOTH, ENCODER, NOTHING_ELSE = "encoder and decoder", "encoder", "nothing else"
MOST_RANK = 1024
# What is trained besides the retrieval layers -> `RunConfig.lock` (§5.4).
TRAINED = {BOTH: "train_both", ENCODER: "lock_decoder", NOTHING_ELSE: "lock_both"}


class RetrievalTrainControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="RetrievalTrainControlNet",
            display_name="Train Retrieval ControlNet",
            category=CATEGORY,
            description=(
                "Trains a retrieval network for a base model on a data set of characters, and "
                f"saves it in models/{folders.NETWORKS}. An interruption saves the network as it "
                "is, and the same settings go on from there."
            ),
            search_aliases=["train ipadapter", "train controlnet", "train reference network"],
            is_output_node=True,
            is_experimental=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model, as its loader gives it: SD 1.5, SD 2.x or SDXL.",
                ),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                io.Clip.Input("clip", tooltip="The base model's text encoder."),
                dataset_folder.make_choice("dataset_name"),
                io.String.Input(
                    "name",
                    default="my_network",
                    tooltip="Name of the network's file, to which a number is added; folder/name "
                    "makes a subfolder.",
                ),
                io.Combo.Input(
                    "task",
                    options=["same character", "composition", "both"],
                    default="same character",
                    tooltip="What is learned: to draw the character of whole pictures, to join the "
                    "faces and the clothes of different pictures, or both in turn.",
                ),
                io.Combo.Input(
                    "trained",
                    options=list(TRAINED),
                    default=BOTH,
                    tooltip="What is trained besides the retrieval layers. The paper found both "
                    "best; less needs less memory.",
                ),
                io.Int.Input(
                    "steps",
                    default=9000,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimiser steps; the paper's settings take 9,000 or 45,000.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-5,
                    min=1e-8,
                    max=1.0,
                    step=1e-8,
                    round=False,
                    tooltip="The highest learning rate; it rises at first and falls to 0.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=MOST_RANK,
                    tooltip="Trains encoder and decoder by low-rank products of this rank, as a "
                    "LoRA does, which needs much less memory; 0 trains them whole.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=2048,
                    step=8,
                    tooltip="Edge of the squares that pictures are placed on, in pixels; 0 is the "
                    "base model's own.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=1024,
                    tooltip="Pictures in one pass; fewer need less memory.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    tooltip="Decides the order of pictures, their views and the noise.",
                ),
                RetrievalDatasetType.Input(
                    "dataset", optional=True, tooltip="From Build Retrieval Dataset."
                ),
                io.Int.Input(
                    "accumulate",
                    default=1,
                    min=1,
                    max=1024,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Passes in one step: a larger batch without more memory.",
                ),
                io.Boolean.Input(
                    "save_memory",
                    default=True,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Computes activations twice instead of storing them: slower, and "
                    "needs much less memory.",
                ),
                io.Int.Input(
                    "references",
                    default=4,
                    min=1,
                    max=64,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="References of each picture; of a composition, half are faces.",
                ),
                io.Float.Input(
                    "text_drop",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Share of pictures that are trained without their prompt. More makes "
                    "the network rely on references, less follows the text.",
                ),
                io.Float.Input(
                    "noise_offset",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Strength of noise that is the same all over a picture, for darker "
                    "and brighter pictures.",
                ),
                io.Int.Input(
                    "sheet_every",
                    default=500,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Steps between sheets of samples, shown as the preview; 0 for none.",
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Steps between checkpoints, for a crash; an interruption saves its "
                    "step in any case.",
                ),
            ],
            outputs=[
                RetrievalControlNetType.Output(display_name="retrieval_controlnet"),
                io.Custom("LOSS_MAP").Output(
                    display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."
                ),
                io.Int.Output(display_name="steps", tooltip="Steps trained."),
                io.String.Output(
                    display_name="file", tooltip=f"The file's name in models/{folders.NETWORKS}."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, trained: str | None, rank: int | None) -> bool | str:
        """Refuses before queueing a rank without effect; a linked value is None."""
        return find_refusal(lambda: check_trained(trained, rank))

    @classmethod
    def fingerprint_inputs(cls, dataset_name: str = CONNECTED, **_: Any) -> str:
        """Changes when the data set does, so that the network is trained again."""
        return dataset_folder.describe_choice(dataset_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        clip: Any,
        dataset_name: str,
        name: str,
        task: str,
        trained: str,
        steps: int,
        learning_rate: float,
        rank: int,
        resolution: int,
        batch_size: int,
        seed: int,
        dataset: Any = None,
        save_memory: bool = True,
        sheet_every: int = 500,
        **advanced: Any,
    ) -> io.NodeOutput:
        from .host.network_training import train_network

        check_trained(trained, rank)
        data_set = dataset_folder.choose(dataset_name, dataset)
        made = train_network(
            model,
            vae,
            clip,
            data_set,
            name,
            task=task,
            lock=TRAINED[trained],
            steps=steps,
            warmup_steps=min(100, steps // 10),
            learning_rate=learning_rate,
            rank=rank or None,
            size=resolution,
            batch_size=batch_size,
            seed=seed,
            checkpoint_activations=save_memory,
            sheet_every=sheet_every or None,
            **advanced,
        )
        shown = ui.PreviewText(made.report).as_dict()
        if made.sheet is not None:
            shown |= ui.PreviewImage(made.sheet, cls=cls).as_dict()
        return io.NodeOutput(made.network, {"loss": made.losses}, steps, made.file, ui=shown)


def check_trained(trained: str | None, rank: int | None) -> None:
    """Raises RetrievalError for an unknown choice, and for a rank out of range or without effect.

    The host leaves all checks of the inputs that `validate_inputs` takes to the node.
    """
    if trained not in (None, *TRAINED):
        names = ", ".join(f"'{name}'" for name in TRAINED)
        raise RetrievalError(f"trained is '{trained}'; choose one of {names}.")
    if rank is not None and not 0 <= rank <= MOST_RANK:
        raise RetrievalError(f"rank is {rank}; give 1 to {MOST_RANK}, or 0 to train without.")
    if trained == NOTHING_ELSE and rank:
        raise RetrievalError(
            f"The rank {rank} has no effect where '{NOTHING_ELSE}' is trained, which leaves "
            f"encoder and decoder as they are; set rank to 0, or trained to '{BOTH}' or "
            f"'{ENCODER}'."
        )
