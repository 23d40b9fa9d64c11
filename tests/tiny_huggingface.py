"""Random Hugging Face BLIP-2 and InstructBLIP folders, small enough to make in a test: stock classes, stock files."""

from pathlib import Path

import torch

from qformer.torch_build.torchvision import import_torchvision
from tests.tiny_checkpoints import WORDS

ARCHITECTURES = (
    "Blip2ForConditionalGeneration",
    "Blip2ForConditionalGeneration-t5",
    "Blip2ForImageTextRetrieval",
    "InstructBlipForConditionalGeneration",
)
IMAGE_SIZE, NUM_QUERIES = 56, 4
PROMPT = "a small"


def write_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32):
    """Write one of `ARCHITECTURES` with its processor and return the model."""
    import_torchvision()
    import transformers

    architecture, _, suffix = name.partition("-")
    torch.manual_seed(5)
    processor = _processor(architecture, "t5" if suffix else "opt")
    base = {"InstructBlipForConditionalGeneration": "InstructBlip"}.get(architecture, "Blip2")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
    }
    qformer = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 24,
    }
    settings = {"num_query_tokens": NUM_QUERIES}
    if architecture == "Blip2ForImageTextRetrieval":
        qformer |= {"vocab_size": _dec_id(processor.tokenizer) + 1, "use_qformer_text_input": True}
        settings |= {"image_text_hidden_size": 20}
    else:
        settings |= {
            "image_token_index": processor.tokenizer.convert_tokens_to_ids("<image>"),
            "text_config": _language_config(suffix, len(processor.tokenizer)),
        }
    if base == "InstructBlip":
        qformer |= {"vocab_size": _dec_id(processor.qformer_tokenizer) + 1}
    config = getattr(transformers, f"{base}Config")(
        vision_config=vision | {"patch_size": 14}, qformer_config=qformer, **settings
    )
    model = getattr(transformers, architecture)(config).eval()
    for key, parameter in model.named_parameters():
        # Fresh weights are so alike (some are zero) that a swap of two would not show.
        scale = 0.05 if key.startswith("language_model") else 0.3
        parameter.data.add_(torch.randn_like(parameter) * scale)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def _processor(architecture: str, language: str):
    from transformers import Blip2Processor, BlipImageProcessor, InstructBlipProcessor

    image_processor = BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    if architecture == "Blip2ForImageTextRetrieval":
        return Blip2Processor(image_processor, bert_tokenizer())
    tokenizer = opt_tokenizer() if language == "opt" else t5_tokenizer()
    if architecture.startswith("Instruct"):
        return InstructBlipProcessor(image_processor, tokenizer, bert_tokenizer(), num_query_tokens=NUM_QUERIES)
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=NUM_QUERIES)


def _language_config(suffix: str, vocab_size: int):
    from transformers import OPTConfig, T5Config

    if suffix == "t5":
        # Flan-T5's shape: gated GELU, output head apart from the embeddings.
        return T5Config(
            vocab_size=vocab_size,
            d_model=24,
            d_kv=12,
            d_ff=40,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        ).to_dict()
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        init_std=0.4,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    ).to_dict()


def bert_tokenizer(*, with_dec: bool = True):
    """As BLIP-2's retrieval tokenizer: BERT's special tokens first, [DEC] last."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    if with_dec:
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def opt_tokenizer():
    """As OPT's: `</s>` (id 2) both starts and ends a text; nothing is appended."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_words(["<s>", "<pad>", "</s>", "<unk>"], "</s> $A"),
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="</s>",
        eos_token="</s>",
    )


def t5_tokenizer():
    """As T5's: padding first, `</s>` appended to every text."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_words(["<pad>", "</s>", "<unk>"], "$A </s>"),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
    )


def _words(special: list[str], template: str):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    unknown = next(token for token in special if "unk" in token.lower())
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(token, vocabulary[token]) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return tokenizer


def _dec_id(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids("[DEC]")
