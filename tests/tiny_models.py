"""Tiny random models with their processors, saved as real ones are: the folders that pretrained encoders load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from benchmarks import vlm
from mmenvs.text import SPECIAL
from mmenvs.world.words import VOCABULARY

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
WORDS = [word for word in VOCABULARY.words if word not in SPECIAL]
Builder = Callable[[], tuple[Any, Any]]


def clip() -> tuple[Any, Any]:
    text = {**SMALL, "vocab_size": len(clip_vocabulary()), "bos_token_id": 0, "eos_token_id": 1}
    text |= {"pad_token_id": 1, "max_position_embeddings": 77, "projection_dim": 24}
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return hf.CLIPModel(config), processor


def siglip() -> tuple[Any, Any]:
    config = hf.SiglipConfig(
        text_config={**SMALL, "vocab_size": 99}, vision_config={**SMALL, "image_size": 32, "patch_size": 8}
    )
    return hf.SiglipModel(config), hf.SiglipImageProcessorPil(size={"height": 32, "width": 32})


def siglip2() -> tuple[Any, Any]:
    vision = {**SMALL, "patch_size": 8, "num_patches": 16}
    config = hf.Siglip2Config(text_config={**SMALL, "vocab_size": 99}, vision_config=vision)
    return hf.Siglip2Model(config), hf.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20)


def dinov2() -> tuple[Any, Any]:
    config = hf.Dinov2Config(**SMALL, image_size=28, patch_size=14)
    processor = hf.BitImageProcessorPil(
        size={"shortest_edge": 40},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return hf.Dinov2Model(config), processor


def vit() -> tuple[Any, Any]:
    # As it is mostly published: a classifier, without the pooling layer of the bare model.
    model = hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8))
    return model, hf.ViTImageProcessorPil(size={"height": 32, "width": 32})


def videomae() -> tuple[Any, Any]:
    config = hf.VideoMAEConfig(**SMALL, image_size=32, patch_size=8, num_frames=4, tubelet_size=2)
    processor = hf.VideoMAEImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return hf.VideoMAEModel(config), processor


def bert() -> tuple[Any, Any]:
    tokenizer = word_pieces("[CLS]", "[SEP]", "[PAD]", "[UNK]")
    return hf.BertModel(hf.BertConfig(**SMALL, vocab_size=len(tokenizer))), tokenizer


def mpnet() -> tuple[Any, Any]:
    tokenizer = word_pieces("<s>", "</s>", "<pad>", "[UNK]")
    config = hf.MPNetConfig(**SMALL, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    return hf.MPNetModel(config), tokenizer


def clap() -> tuple[Any, Any]:
    audio = {
        "spec_size": 64,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_mel_bins": 16,
        "window_size": 4,
        "projection_dim": 24,
        "enable_fusion": False,
    }
    config = hf.ClapConfig(audio_config=audio, text_config={**SMALL, "vocab_size": 99}, projection_dim=24)
    extractor = hf.ClapFeatureExtractor(
        feature_size=16, sampling_rate=48_000, max_length_s=1, truncation="rand_trunc", frequency_max=14_000
    )
    return hf.ClapModel(config), extractor


def ast() -> tuple[Any, Any]:
    config = hf.ASTConfig(
        **SMALL, num_mel_bins=16, max_length=100, frequency_stride=8, time_stride=8, patch_size=8
    )
    return hf.ASTModel(config), hf.ASTFeatureExtractor(num_mel_bins=16, max_length=100)


def whisper() -> tuple[Any, Any]:
    config = hf.WhisperConfig(
        vocab_size=99,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        max_source_positions=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        dropout=0.3,
    )
    extractor = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    return hf.WhisperForConditionalGeneration(config), extractor


def wav2vec2() -> tuple[Any, Any]:
    config = hf.Wav2Vec2Config(
        **SMALL,
        vocab_size=9,
        conv_dim=(16, 16),
        conv_kernel=(10, 8),
        conv_stride=(5, 64),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return hf.Wav2Vec2Model(config), hf.Wav2Vec2FeatureExtractor()


BUILDERS: dict[str, dict[str, Builder]] = {
    "image": {"clip": clip, "siglip": siglip, "siglip2": siglip2, "dinov2": dinov2, "vit": vit},
    "images": {"videomae": videomae, "clip": clip, "dinov2": dinov2},
    "text": {"bert": bert, "mpnet": mpnet, "clip": clip},
    "audio": {"clap": clap, "ast": ast, "whisper": whisper, "wav2vec2": wav2vec2},
}


def idefics3() -> tuple[Any, Any]:
    return vlm.idefics3(width=32, layers=2, size=32)


def llava() -> tuple[Any, Any]:
    words = vlm.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<|image_pad|>"]})
    text = {**SMALL, "vocab_size": len(words), "bos_token_id": None, "max_position_embeddings": 1024}
    text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8),
        text_config=hf.LlamaConfig(**text),
        image_token_index=words.convert_tokens_to_ids("<|image_pad|>"),
        image_seq_length=16,
    )
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=vlm.TEMPLATE.replace("<image>", "<|image_pad|>"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    """Needs torchvision, as its processor also reads film."""
    marks = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    words = vlm.tokenizer()
    words.add_special_tokens({"additional_special_tokens": marks})
    start, image, video, end = words.convert_tokens_to_ids(marks)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    text = {**SMALL, "vocab_size": len(words), "bos_token_id": None, "num_key_value_heads": 2}
    text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(patch_size=8, size=size),
        words,
        hf.Qwen2VLVideoProcessor(patch_size=8, size=size),
        chat_template=vlm.TEMPLATE.replace("<image>", "".join(marks[:2] + marks[3:])),
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


VLMS: dict[str, Builder] = {"idefics3": idefics3, "llava": llava, "qwen2_5_vl": qwen2_5_vl}


def save(build: Builder, folder: Path) -> Path:
    """Build a model from a fixed seed and save it with what belongs to it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build()
        for name, parameter in model.named_parameters():
            # Fresh weights are so small that all inputs look alike.
            if parameter.dim() > 1 and "position" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if build is clip:
        clip_tokenizer().save_pretrained(folder)
    return folder


def word_pieces(start: str, end: str, pad: str, unknown: str) -> hf.PreTrainedTokenizerFast:
    """WordPiece, as of BERT, that splits every second word."""
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [pad, start, end, unknown, *letters, *(f"##{letter}" for letter in letters)]
    pieces += [word for word in WORDS[::2] if word not in pieces]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=start,
        sep_token=end,
        pad_token=pad,
        unk_token=unknown,
        model_max_length=512,
    )


def clip_vocabulary() -> dict[str, int]:
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "re",
        "red</w>",
    ]
    return {piece: i for i, piece in enumerate(pieces)}


def clip_tokenizer() -> hf.CLIPTokenizer:
    """Byte pairs, as of CLIP, with two merges."""
    return hf.CLIPTokenizer(
        vocab=clip_vocabulary(), merges=[("r", "e"), ("re", "d</w>")], model_max_length=77
    )


def byte_pairs() -> hf.PreTrainedTokenizerFast:
    """Byte pairs, as of GPT-2 and RoBERTa: a word behind a blank is another one than at the start."""
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = ["<pad>", "<s>", "</s>", *letters, "Ġ", "Ġr", "Ġre", "Ġred", "re"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "r"), ("Ġr", "e"), ("Ġre", "d"), ("r", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


def vlms(root):
    """What gives the folder of a tiny vision-language model by its name, made below ``root`` when first asked for."""

    def get(name: str = "idefics3") -> str:
        if name == "qwen2_5_vl":
            pytest.importorskip("torchvision", reason="the processor of Qwen2.5-VL needs torchvision")
        if not (root / name).exists():
            save(VLMS[name], root / name)
        return str(root / name)

    return get
