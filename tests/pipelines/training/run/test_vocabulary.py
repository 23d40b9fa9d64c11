"""A vocabulary learned from captions."""

import json
import random

import pytest

from pipelines.training.run.vocabulary import learn_text_tokenizer
from qformer.errors import UserError
from qformer.text import load_text_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz\u00e4\u00df\u65e5\u672c"


def learned(captions, folder):
    learn_text_tokenizer(lambda: iter(captions), folder)
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def test_the_same_captions_in_any_order_give_the_same_numbers(tmp_path):
    """Words of chance, whose parts are all as rare as each other."""
    chance = random.Random(0)
    words = ["".join(chance.choices(LETTERS, k=chance.randint(1, 9))) for _ in range(400)]
    captions = [" ".join(words[place : place + 8]) for place in range(0, len(words), 8)]
    first = learned(captions, tmp_path / "first")
    assert len(first) > 400 and list(first.values()) == list(range(len(first)))
    for turn in range(3):
        assert learned(captions[::-1], tmp_path / str(turn)) == first


def test_every_word_is_one_token_between_the_special_ones(tmp_path):
    learn_text_tokenizer(lambda: ["A small red circle", "a large red square"], tmp_path)
    tokenizer = load_text_tokenizer(str(tmp_path), 8)
    ids = tokenizer.encode(["a LARGE red circle"]).input_ids_BT[0].tolist()
    assert tokenizer.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "large", "red", "circle", "[SEP]"]
    assert tokenizer.tokenizer.pad_token_id == 0
    assert tokenizer.tokenizer.all_special_tokens == ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]


def test_a_folder_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.BertTokenizerFast.save_pretrained", no_room)
    with pytest.raises(OSError, match="No space"):
        learn_text_tokenizer(lambda: ["a red circle"], tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_captions_without_words_are_refused(tmp_path, captions):
    with pytest.raises(UserError, match="found no words in the captions"):
        learn_text_tokenizer(lambda: captions, tmp_path)
