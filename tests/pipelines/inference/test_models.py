"""A captioner in use: what becomes of instructions that are longer than those of training."""

import dataclasses
import json

import pytest
import torch

from pipelines.inference.models import Captioner, load_captioner
from qformer.config import GenerationSettings
from qformer.conversion.huggingface import export_huggingface
from tests.tiny_checkpoints import TEXT, WORDS, text_tokenizer, write_stage2

LONG = f"{TEXT} {TEXT} {TEXT}"  # 45 words; the checkpoint takes 16 tokens, with the leading one


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return load_captioner(write_stage2(tmp_path_factory.mktemp("bridge") / "stage2"))


def test_answers_end_as_the_bridge_was_taught(tmp_path):
    """As LAVIS' OPT with a newline; an exported folder says the same to stock."""
    folder = write_stage2(tmp_path / "stage2")
    file = folder / "bridge.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "answer_end_id": 9}))
    language = load_captioner(folder).language
    assert set(language.end_ids) == {9, language.tokenizer.eos_token_id}
    export_huggingface(folder, tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == 9


def pixels(captioner, count):
    size = captioner.preprocessing.height
    return torch.randint(0, 256, (count, 1, 3, size, size), dtype=torch.uint8)


def test_a_long_instruction_is_cut_as_in_training_and_counted(captioner):
    batch, settings = pixels(captioner, 2), GenerationSettings(max_new_tokens=8)
    first = " ".join((WORDS * 2)[:15])
    assert captioner.answer(batch, [LONG, "red"], settings) == captioner.answer(batch, [first, "red"], settings)
    other = " ".join((WORDS * 2)[:14])
    assert captioner.answer(batch, [LONG, "red"], settings) != captioner.answer(batch, [other, "red"], settings)
    assert captioner.num_truncated([LONG, "red", first, LONG]) == 2
    assert captioner.num_truncated(["", first]) == 0
    # What the model is trained on is cut at the same word.
    trained = captioner.language.tokenize([LONG], ["red"], max_tokens=16)
    again = captioner.language.tokenize([first], ["red"], max_tokens=16)
    assert torch.equal(trained.input_ids_BS, again.input_ids_BS) and trained.num_truncated == 1


def test_the_prompt_of_training_counts_where_it_stands_in(captioner):
    info = dataclasses.replace(captioner.info, prompt=LONG)
    prompted = Captioner(info, captioner.encoder, captioner.stage2, captioner.language)
    assert prompted.num_truncated(["", "red", ""]) == 2


def test_what_the_q_former_alone_cuts_counts_too(captioner):
    info = dataclasses.replace(captioner.info, max_text_tokens=64)
    reading = Captioner(info, captioner.encoder, captioner.stage2, captioner.language, text_tokenizer())
    assert reading.num_truncated([LONG, "red"]) == 1
