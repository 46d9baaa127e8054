"""Models that score: BLIP as `tiny_models` makes it, and the host's own, of noise."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import tiny_models
import torch
from making import randomised

HOST = Path(comfy.sd1_clip.__file__).parent


def blip(folder: Path, silent: bool = False) -> Path:
    """BLIP VQA that surely answers something, or surely nothing."""
    from transformers import AutoTokenizer, BlipForQuestionAnswering

    tiny_models.make_blip(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BlipForQuestionAnswering.from_pretrained(folder)
    bias = model.text_decoder.cls.predictions.bias
    with torch.no_grad():
        bias[tokenizer.all_special_ids] = -1000
        bias[tokenizer.sep_token_id] = 1000 if silent else -1000
    model.save_pretrained(folder)
    return folder


def host_clip() -> comfy.sd.CLIP:
    """The host's CLIP of SD 1.x, small, with the host's tokenizer."""
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    options = {"dtype": torch.float32, "clip_l_model_config": {**shape, "intermediate_size": 64}}
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel
    )
    made = comfy.sd.CLIP(target, model_options=options)
    randomised(made.cond_stage_model, 5)
    return made


def host_clip_vision(folder: Path) -> comfy.clip_vision.ClipVisionModel:
    """The host's CLIP_VISION, small."""
    config = json.loads((HOST / "clip_vision_config_vitl.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "image_size": 28, "projection_dim": 12}
    path = folder / "clip_vision.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    made = comfy.clip_vision.ClipVisionModel(str(path))
    randomised(made.model, 6)
    return made
