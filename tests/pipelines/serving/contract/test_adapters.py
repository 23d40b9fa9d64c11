"""Which adapters share their backbones, and how requests choose one."""

import json
from pathlib import Path

import pytest

from pipelines.serving.contract.adapters import (
    Adapter,
    AdapterTable,
    SharedEncoder,
    SharedLanguage,
    require_shared_backbones,
)
from pipelines.serving.contract.errors import ApiError
from qformer.config import LanguageSpec, VisionSpec
from qformer.errors import UserError
from tests.pipelines.serving.answering import adapter


def test_an_adapter_in_a_config_of_before_is_read():
    """Recorded by the version whose encoder was five loose fields."""
    found = Adapter.from_dict(json.loads((Path(__file__).parent / "former_adapter.json").read_text()))
    vision = VisionSpec("/runs/demo/vision", pretrained=False, layer=-1, image_size=96)
    assert found.encoder == SharedEncoder(vision=vision, width=4)
    assert found.language == SharedLanguage(language=LanguageSpec("opt"), answer_end_id=None)
    assert Adapter.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_adapters_survive_json():
    one = adapter()
    assert Adapter.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_keys_tell_checkpoints_apart_and_not_their_places():
    first, second = adapter(folder="/secret/a/step-1"), adapter(folder="/secret/b/step-1")
    assert first.key != second.key and "secret" not in first.key and first.key.startswith("demo@")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([adapter("demo")], "'demo' is given twice"),
        (
            [adapter("b", encoder=SharedEncoder(vision=VisionSpec("other"), width=48))],
            "'b' has another vision enc",
        ),
        ([adapter("b", encoder=SharedEncoder(vision=VisionSpec("vit", layer=-1), width=48))], "layer=-1"),
        ([adapter("b", language=SharedLanguage(language=LanguageSpec("t5"), answer_end_id=None))], "name='t5'"),
        ([adapter("b", language=SharedLanguage(language=LanguageSpec("opt"), answer_end_id=7))], "answer_end_id=7"),
        ([adapter("b", has_lora=True)], "'b' changes the language model"),
    ],
)
def test_adapters_of_other_backbones_are_refused_by_name(others, message):
    with pytest.raises(UserError, match=message):
        require_shared_backbones([adapter("demo"), *others])


def test_adapters_that_fit():
    search = adapter("search", stage=1)
    require_shared_backbones([adapter("demo"), adapter("b", num_frames=16), search])
    require_shared_backbones([search, adapter("demo", has_lora=True)])


def test_choosing():
    demo, search, other = adapter("demo"), adapter("search", stage=1), adapter("other")
    table = AdapterTable([demo, search, other])
    assert table.find(None, generates=True) is demo and table.find(None, generates=False) is search
    assert table.find("other", generates=True) is other and table.find("other/step-00000003", generates=True) is other
    for name, generates, status in (("x", True, 404), ("search", True, 400), ("demo", False, 400)):
        with pytest.raises(ApiError) as caught:
            table.find(name, generates=generates)
        assert caught.value.status == status and caught.value.refusal.param == "model"
    with pytest.raises(ApiError) as caught:
        AdapterTable([demo]).find(None, generates=False)
    assert caught.value.status == 404
