"""Loading models in the format of transformers from a folder.

Only safetensors, only files in the folder, and no code that comes with a model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrievalError, explain
from .model_folder import check

LOCAL = {"local_files_only": True, "trust_remote_code": False}
# Attention named owner/kernel is compiled code that transformers would fetch from the hub.
_KERNEL = re.compile(r'attn_implementation\w*"\s*:\s*"[^"]*/')


def import_transformers() -> ModuleType:
    """Imports transformers.

    Raises:
        RetrievalError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise RetrievalError(
            f"CLIP, DINO and VQA models need the package transformers ({error}); install "
            "'transformers>=4.50' into this Python."
        ) from error
    return transformers


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        RetrievalError: see `model_folder.check`; a damaged config.json; one that asks for code
            from the hub.
    """
    check(folder)
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        config = json.loads(text)
        config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RetrievalError(
            f"The config.json in '{folder}' is not that of a transformers model "
            f"({explain(error)}); fetch the model again."
        ) from error
    if _KERNEL.search(text):
        raise RetrievalError(
            f"The config.json in '{folder}' asks for attention code from the hub, which is never "
            "run here; remove its attn_implementation."
        )
    return config


def choose_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    kind: str, folder: Path, device: Any = None, dtype: torch.dtype | None = None, **options: Any
) -> nn.Module:
    """The model in `folder` as transformers' class `kind`, in eval mode, float32 by default.

    Raises:
        RetrievalError: it cannot be read, or the files lack weights of the model.
    """
    transformers = import_transformers()
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options["dtype" if version >= (4, 56) else "torch_dtype"] = dtype or torch.float32
    try:
        # A host may call from inference mode, whose tensors could not be moved outside of it.
        with torch.inference_mode(False):
            model, info = getattr(transformers, kind).from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **LOCAL, **options
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged folder raises a dozen classes
        raise RetrievalError(
            f"The model in '{folder}' cannot be loaded as {kind} ({explain(error)}); fetch it "
            "again, or use another model."
        ) from error
    missing = _list_missing(model, info["missing_keys"])
    if missing:
        raise RetrievalError(
            f"The weights in '{folder}' lack {len(missing)} of {kind}, such as {missing[0]}; fetch "
            "the model again, or use another."
        )
    model = model.eval().requires_grad_(False)
    return model if device is None else model.to(device)


def load_part(kind: str, folder: Path, **options: Any) -> Any:
    """The processor, image processor or tokenizer (transformers' class `kind`) in `folder`.

    Raises:
        RetrievalError: it is missing or cannot be read.
    """
    transformers = import_transformers()
    names = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}
    what = names.get(kind, "processor")
    try:
        part = getattr(transformers, kind).from_pretrained(folder, **LOCAL, **options)
        tokenizer = part if kind == "AutoTokenizer" else getattr(part, "tokenizer", None)
        # Without its files, transformers 5 makes one that knows no words.
        if tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is not there")
        return part
    except Exception as error:
        raise RetrievalError(
            f"The {what} in '{folder}' cannot be loaded ({explain(error)}); fetch the model with "
            "all of its files."
        ) from error


def move_inputs(inputs: Any, model: nn.Module) -> dict[str, Tensor]:
    """A processor's tensors on the model's device; those of floats in its precision."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


def _list_missing(model: nn.Module, names: list[str]) -> list[str]:
    """Of `names`, the parameters that no loaded parameter is tied to."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {p.data_ptr() for name, p in parameters.items() if name not in set(names)}
    return [n for n in names if n in parameters and parameters[n].data_ptr() not in loaded]
