"""Fixtures that several test modules of the model library share."""

import pytest

from qformer.config import LanguageSpec, VisionSpec
from qformer.conversion.bundle import ImportOptions
from qformer.conversion.huggingface import export_huggingface
from tests.qformer.folders import imported
from tests.qformer.lavis import facts, write_encoder, write_tokenizer
from tests.tiny_huggingface import ARCHITECTURES, write_folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Every architecture once: stock model, stock folder, our import of it, our export of that."""
    root, made = tmp_path_factory.mktemp("huggingface"), {}
    for name in ARCHITECTURES:
        paths = [root / f"{name}-{step}" for step in ("stock", "ours", "exported")]
        model = write_folder(paths[0], name)
        bundle = imported(paths[0], paths[1])
        made[name] = (model, *paths, bundle.report, export_huggingface(paths[1], paths[2]))
    return made


@pytest.fixture
def options(goldens_dir, tmp_path):
    """What a file of the goldens does not say, by the file's name."""

    def make(name="stage1_weights"):
        config = facts(goldens_dir, name)
        bert = config["bert"]
        return ImportOptions(
            vision=VisionSpec(write_encoder(tmp_path / "timm", config["encoder_width"])),
            language=LanguageSpec("a-named-model"),
            tokenizer=write_tokenizer(tmp_path / "bert", bert["vocab_size"]),
            num_heads=bert["num_attention_heads"],
        )

    return make
