"""The Q-Former's text tokenizer: which kinds it takes."""

import pytest

from qformer.errors import UserError
from qformer.text import load_text_tokenizer
from qformer.torch_build.torchvision import import_torchvision
from tests.tiny_checkpoints import word_tokenizer


def save_tokenizer(folder, special):
    import_torchvision()
    from transformers import PreTrainedTokenizerFast

    inner = word_tokenizer([*special, "[UNK]"], "[CLS] $A [SEP]" if "[SEP]" in special else "[CLS] $A")
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **{k: v for k, v in names.items() if v in special})
    made.save_pretrained(folder)
    return made


def test_a_tokenizer_that_pads_with_another_id_is_refused(tmp_path):
    """As RoBERTa's: [CLS] 0, [PAD] 1. The Q-Former's embedding of id 0 is never trained."""
    save_tokenizer(tmp_path / "roberta", ["[CLS]", "[PAD]", "[SEP]"])
    with pytest.raises(UserError, match=r"roberta' pads with id 1 .* use a BERT tokenizer, or 'corpus'"):
        load_text_tokenizer(str(tmp_path / "roberta"), 16)


def test_a_tokenizer_without_a_needed_token_is_refused(tmp_path):
    save_tokenizer(tmp_path / "half", ["[PAD]", "[CLS]"])
    with pytest.raises(UserError, match="has no sep_token; use a BERT tokenizer"):
        load_text_tokenizer(str(tmp_path / "half"), 16)


def test_the_tokenizer_of_another_q_former_is_refused(tmp_path):
    made = save_tokenizer(tmp_path / "bert", ["[PAD]", "[CLS]", "[SEP]"])
    size = len(made) + 1  # [DEC]
    assert load_text_tokenizer(str(tmp_path / "bert"), 16, size).vocab_size == size
    with pytest.raises(UserError, match=rf"bert' has {size} ids with \[DEC\] but the Q-Former vocab_size=7; give"):
        load_text_tokenizer(str(tmp_path / "bert"), 16, 7)
