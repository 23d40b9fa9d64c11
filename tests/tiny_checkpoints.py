"""Random checkpoints small enough to load in a test: real models, real files, nothing learned."""

import dataclasses
from pathlib import Path

import torch

from pipelines.data.storage.checkpoint_folders import write_marker
from qformer.adapters.lora import Lora
from qformer.backbones import load_language, load_vision
from qformer.bridges.table import IMAGE_BRIDGE, BridgeConfig
from qformer.config import LanguageSpec, LoraConfig, QFormerConfig, VisionSpec
from qformer.conversion.checkpoint import BridgeInfo, save_bridge
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2
from qformer.text import TextTokenizer
from qformer.torch_build.torchvision import import_torchvision

VISION = "test_vit"  # timm's smallest ViT, 160 px, random weights
NUM_FRAMES = 4
TEXT = "a small large red green blue circle square triangle left right of above moving still"
WORDS = TEXT.split()
LANGUAGE_WIDTH = 32


def write_stage1(folder: Path, *, bridge: BridgeConfig = IMAGE_BRIDGE) -> Path:
    """A retriever's checkpoint folder."""
    torch.manual_seed(1)
    tokenizer = text_tokenizer()
    return _write(folder, 1, Stage1(_config(tokenizer.vocab_size), bridge=bridge), tokenizer, None)


def text_tokenizer() -> TextTokenizer:
    """The Q-Former's own, of whole words."""
    import_torchvision()
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[CLS] $A [SEP]"),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    return TextTokenizer(tokenizer, 16)


def write_stage2(
    folder: Path,
    lora: LoraConfig | None = None,
    *,
    language: Path | None = None,
    seed: int = 2,
    reads_prompt: bool = False,
    bridge: BridgeConfig = IMAGE_BRIDGE,
) -> Path:
    """A captioner's checkpoint folder, its language model beside it unless there is one."""
    torch.manual_seed(seed)
    if language is None:
        language = folder.with_name(folder.name + "-language")
        _write_language(language)
    updates = None if lora is None else Lora(load_language(LanguageSpec(str(language)))[0], lora)
    tokenizer = text_tokenizer() if reads_prompt else None
    stage2 = Stage2(
        _config(tokenizer.vocab_size if tokenizer else 0, has_lm_head=False),
        language_width=LANGUAGE_WIDTH,
        lora=updates,
        bridge=bridge,
    )
    return _write(folder, 2, stage2, tokenizer, str(language), lora)


def _config(vocab_size: int, has_lm_head: bool = True) -> QFormerConfig:
    return QFormerConfig(
        has_lm_head=has_lm_head,
        encoder_width=load_vision(VisionSpec(VISION, pretrained=False)).width,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        num_queries=4,
        vocab_size=vocab_size,
        max_positions=32,
        embed_dim=16,
    )


def _write(folder, stage, trainables, tokenizer, language, lora=None) -> Path:
    for parameter in trainables.parameters():
        # Fresh weights are so small that every picture would look alike to the model.
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    folder.mkdir(parents=True)
    own = trainables.qformer.config
    config = _config(own.vocab_size, own.has_lm_head)  # of an image's Q-Former, which need not be the one that is read
    info = dataclasses.replace(info_of(stage, config, language), lora=lora, bridge=trainables.bridge.config)
    save_bridge(folder, info, trainables.state_dict(), tokenizer)
    write_marker(folder, {"step": 3})
    return folder


def info_of(stage: int, config: QFormerConfig, language: str | None = None) -> BridgeInfo:
    """What a checkpoint says about itself."""
    return BridgeInfo(
        stage=stage,
        step=3,
        vision=VisionSpec(VISION, pretrained=False),
        language=None if language is None else LanguageSpec(str(language)),
        qformer=config,
        preprocessing=load_vision(VisionSpec(VISION, pretrained=False)).preprocessing,
        num_frames=NUM_FRAMES,
        max_text_tokens=16,
    )


def word_tokenizer(special: list[str], template: str):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(token, vocabulary[token]) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return tokenizer


def _write_language(folder: Path) -> None:
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(special, "<bos> $A"),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    config = LlamaConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=LANGUAGE_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
