"""Tiny detectors and segmenters of the true architectures, written as `tiny_models` writes its."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import TEXT, VISION, bert, made, make_clip


def make_grounding_dino(folder: Path) -> Path:
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    tokenizer = bert(folder)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
            window_size=2, out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(**TEXT, vocab_size=len(tokenizer)),
        num_queries=10, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, d_model=64, max_text_len=32,
    )  # fmt: skip
    model = made(GroundingDinoForObjectDetection(config), 0.1)
    model.save_pretrained(folder)
    sizes = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(sizes, tokenizer).save_pretrained(folder)
    return folder


def make_owlv2(folder: Path) -> Path:
    from transformers import (
        AutoTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    tokenizer = AutoTokenizer.from_pretrained(make_clip(folder / "made"))
    tokenizer.model_max_length = 16
    ids = dict(bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1)
    config = Owlv2Config(
        text_config=dict(TEXT, vocab_size=len(tokenizer), max_position_embeddings=16, **ids),
        vision_config=VISION,
        projection_dim=32,
    )
    made(Owlv2ForObjectDetection(config)).save_pretrained(folder)
    sizes = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(sizes, tokenizer).save_pretrained(folder)
    return folder


def make_sam(folder: Path) -> Path:
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    config = SamConfig(
        vision_config=dict(
            hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2,
            image_size=64, patch_size=8, mlp_dim=64, window_size=4, global_attn_indexes=[1],
            num_pos_feats=8,
        ),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=32, num_attention_heads=2,
                                 iou_head_hidden_dim=16),
    )  # fmt: skip
    made(SamModel(config)).save_pretrained(folder)
    sizes = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    SamProcessor(sizes).save_pretrained(folder)
    return folder


def make_clipseg(folder: Path) -> Path:
    from transformers import (
        AutoTokenizer,
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPSegProcessor,
        ViTImageProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(make_clip(folder / "made"))
    ids = dict(bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1)
    config = CLIPSegConfig(
        text_config=dict(TEXT, vocab_size=len(tokenizer), **ids), vision_config=VISION,
        projection_dim=32, extract_layers=[0, 1], reduce_dim=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )  # fmt: skip
    model = made(CLIPSegForImageSegmentation(config))
    torch.nn.init.zeros_(model.decoder.transposed_convolution.bias)
    model.save_pretrained(folder)
    sizes = ViTImageProcessor(size={"height": 32, "width": 32})
    CLIPSegProcessor(sizes, tokenizer).save_pretrained(folder)
    return folder
