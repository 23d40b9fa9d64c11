"""Text piece by piece: joined it is the whole, and no piece holds half a character or a part of a stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qformer.generation.requests.text_stream import TextStream
from tests.qformer.test_language import tiny_language

TEXTS = [
    "plain words, and more",
    "  Überraschung — 漢字 🙂👩‍👩‍👧 é ",
    "\n\nnew\n lines \n\n",
    "",
    "  ",
    "ends in �",
    "a\ufffdb 🙂",
]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, as byte-level BPE falls back to; special ids around."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def pieces(tokenizer, ids, stop=(), is_streamed=True):
    stream = TextStream(tokenizer, stop, is_streamed)
    told = []
    for token in ids:
        told.append(stream.add(token))
        if stream.is_stopped:
            break
    return [*told, stream.finish()], stream.is_stopped


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_stripped_text(byte_tokenizer, text):
    ids = [*byte_tokenizer.encode(text), 0]
    told, _ = pieces(byte_tokenizer, ids)
    assert "".join(told) == text.strip()
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in told)
    whole, _ = pieces(byte_tokenizer, ids, is_streamed=False)
    assert whole == [""] * len(ids) + [text.strip()]


def test_text_comes_as_soon_as_it_can(byte_tokenizer):
    told, _ = pieces(byte_tokenizer, byte_tokenizer.encode("ab é c"))
    assert told == ["a", "b", "", "", " é", "", " c", ""]


def test_bytes_that_become_no_character_come_at_the_end(byte_tokenizer):
    broken = byte_tokenizer.encode("ok 🙂")[:-2]
    told, _ = pieces(byte_tokenizer, broken)
    assert "".join(told) == byte_tokenizer.decode(broken).strip() and told[-1] != ""


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("red STOP blue", ("STOP",), "red"),
        ("red STO blue", ("STOP",), "red STO blue"),  # begins as a stop string does
        ("red ST", ("STOP",), "red ST"),  # and ends so
        ("aab", ("ab",), "a"),  # the first guess was wrong
        ("one\n\ntwo", ("\n\n", "two"), "one"),
        ("one two", ("two", "ne"), "o"),  # the first in the text, not in the list
        ("é🙂x", ("🙂",), "é"),
        ("STOP", ("STOP",), ""),
        ("abcabd!", ("abd",), "abc"),
    ],
)
def test_no_piece_holds_a_part_of_a_stop_string(byte_tokenizer, text, stop, expected):
    told, is_stopped = pieces(byte_tokenizer, byte_tokenizer.encode(text), stop)
    assert "".join(told) == expected
    assert is_stopped == any(one in text for one in stop)
    whole, _ = pieces(byte_tokenizer, byte_tokenizer.encode(text), stop, is_streamed=False)
    assert "".join(whole) == expected and not any(whole[:-1])


def test_random_texts_and_stops_equal_the_plain_way(byte_tokenizer):
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("ab é🙂", k=draw.randrange(12)))
        stops = tuple("".join(draw.choices("ab é", k=draw.randint(1, 3))) for _ in range(draw.randrange(3)))
        told, _ = pieces(byte_tokenizer, byte_tokenizer.encode(text), stops)
        # A stop string counts as soon as it is whole: cut at the earliest beginning among those that end first.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        seen = text[: min(ends)] if ends else text
        cut = min([seen.find(stop) for stop in stops if stop in seen], default=len(seen))
        assert "".join(told) == seen[:cut].strip(), (text, stops)


def test_words_are_joined_as_the_tokenizer_joins_them():
    tokenizer = tiny_language("llama").tokenizer
    ids = tokenizer.encode("small red circle left of green")
    told, _ = pieces(tokenizer, ids)
    assert "".join(told) == "small red circle left of green" and told[1:3] == ["small", " red"]
