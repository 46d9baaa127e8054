"""Tiny models of the true architectures with true processors, written as a hub would have them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

QUESTION = "what is in the picture?"
WORDS = ("a cat sits on the red sofa", "the pose of the character is standing", QUESTION)
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
PIXELS = {"size": {"height": 32, "width": 32}}
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
    patch_size=8,
)  # fmt: skip
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def made(model, spread: float = 0.3):
    """The model with weights so large that pictures and words make a difference."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
    return model.eval()


def write_bpe(folder: Path, special: list[str]) -> tuple[str, str]:
    """A byte-level BPE trained on a few words: paths of vocab.json and merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(WORDS, vocab_size=300, special_tokens=special)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = tokenizer.save_model(str(folder))
    return vocabulary, merges


def bpe(folder: Path, special: list[str]):
    """The same as a tokenizer of transformers; the first special tokens are <s>, </s>, <pad>."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    inner = ByteLevelBPETokenizer(*write_bpe(folder / "made", special))._tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=special[3:], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def bert(folder: Path):
    """BERT's tokenizer, in letters, with BLIP's [DEC]."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz?.,"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(
        str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"], model_max_length=64
    )


def make_clip(folder: Path) -> Path:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizerFast,
    )

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "th", "the</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    ids = dict(bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    text = dict(TEXT, vocab_size=len(words), max_position_embeddings=77, **ids)
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    made(CLIPModel(config)).save_pretrained(folder)
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def make_dino(folder: Path, kind: str = "vit") -> Path:
    """facebook/dino-vits16's kind, or DINOv2's."""
    from transformers import (
        BitImageProcessor,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    if kind == "vit":
        made(ViTModel(ViTConfig(**VISION), add_pooling_layer=False)).save_pretrained(folder)
        ViTImageProcessor(**PIXELS).save_pretrained(folder)
    else:
        made(Dinov2Model(Dinov2Config(**VISION))).save_pretrained(folder)
        sizes = dict(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
        BitImageProcessor(**sizes).save_pretrained(folder)
    return folder


def make_blip(folder: Path) -> Path:
    from transformers import (
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
    )

    tokenizer = bert(folder)
    ids = dict(
        pad_token_id=0, sep_token_id=3, eos_token_id=3,
        bos_token_id=tokenizer.convert_tokens_to_ids("[DEC]"),
    )  # fmt: skip
    text = dict(TEXT, vocab_size=len(tokenizer), max_position_embeddings=128, **ids)
    text |= dict(encoder_hidden_size=32, projection_dim=16, is_decoder=True)
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=16)
    made(BlipForQuestionAnswering(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(**PIXELS), tokenizer).save_pretrained(folder)
    return folder


def make_instructblip(folder: Path, language: str = "opt") -> Path:
    """With a decoder (OPT, as with Vicuna) or an encoder-decoder (T5) as its language model."""
    from transformers import (
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    qformer_tokenizer = bert(folder / "made")
    tokenizer = bpe(folder, ["<s>", "</s>", "<pad>", "<image>"])
    ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, vocab_size=len(tokenizer))
    if language == "opt":
        text = dict(model_type="opt", hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                    num_attention_heads=2, word_embed_proj_dim=32, **ids)  # fmt: skip
    else:
        text = dict(model_type="t5", d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2,
                    decoder_start_token_id=2, **ids)  # fmt: skip
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=dict(TEXT, vocab_size=len(qformer_tokenizer), encoder_hidden_size=32,
                            cross_attention_frequency=1, max_position_embeddings=64),
        text_config=text, num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    made(InstructBlipForConditionalGeneration(config)).save_pretrained(folder)
    InstructBlipProcessor(
        BlipImageProcessor(**PIXELS), tokenizer, qformer_tokenizer, num_query_tokens=4
    ).save_pretrained(folder)
    return folder


def _sampling(model):
    """As many chat models are published: sampling by default, which the scores must not do."""
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.99)
    return model


def _llama(tokenizer) -> dict:
    return dict(TEXT, model_type="llama", vocab_size=len(tokenizer), num_key_value_heads=2,
                bos_token_id=0, eos_token_id=1, pad_token_id=2)  # fmt: skip


def make_llava(folder: Path) -> Path:
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = bpe(folder, ["<s>", "</s>", "<pad>", "<image>"])
    config = LlavaConfig(
        vision_config=dict(VISION, model_type="clip_vision_model", projection_dim=16),
        text_config=_llama(tokenizer), vision_feature_layer=-2,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    _sampling(made(LlavaForConditionalGeneration(config))).save_pretrained(folder)
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        CLIPImageProcessor(**sizes), tokenizer, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=CHAT.replace("MARK", "<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_idefics3(folder: Path) -> Path:
    """Also what SmolVLM is, but for its videos."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    special = ["<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>"]
    tokenizer = bpe(folder, [*special, "<end_of_utterance>", "<global-img>"])
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(
        vision_config=VISION, text_config=_llama(tokenizer), image_token_id=image, scale_factor=2,
        pad_token_id=2,
    )  # fmt: skip
    _sampling(made(Idefics3ForConditionalGeneration(config))).save_pretrained(folder)
    sizes = dict(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    Idefics3Processor(
        Idefics3ImageProcessor(do_image_splitting=False, **sizes), tokenizer, image_seq_len=4,
        chat_template=CHAT.replace("MARK", "<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_qwen2_vl(folder: Path) -> Path:
    from transformers import (
        Qwen2TokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    special = ["<s>", "</s>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>",
               "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
    files = write_bpe(folder / "made", special)
    tokenizer = Qwen2TokenizerFast(
        *files, eos_token="</s>", pad_token="<|endoftext|>", additional_special_tokens=special[3:]
    )
    starts, ends, image, video = (tokenizer.convert_tokens_to_ids(s) for s in special[3:])
    config = Qwen2VLConfig(
        text_config=dict(
            TEXT, vocab_size=len(tokenizer), num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
            pad_token_id=2, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2,
                           patch_size=8),
        image_token_id=image, video_token_id=video, vision_start_token_id=starts,
        vision_end_token_id=ends,
    )  # fmt: skip
    _sampling(made(Qwen2VLForConditionalGeneration(config))).save_pretrained(folder)
    pixels = dict(patch_size=8, min_pixels=32 * 32, max_pixels=32 * 32)
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder
