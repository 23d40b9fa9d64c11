"""Stock folders, our checkpoints of them, and what the tests on both compare."""

import contextlib

import torch
from PIL import Image
from safetensors.torch import load_file

from qformer.conversion.bundle import ImportOptions
from qformer.conversion.huggingface import import_huggingface
from qformer.conversion.vision import write_timm_vit
from tests.tiny_huggingface import IMAGE_SIZE

FRESH = ImportOptions(allow_fresh=True)


def imported(source, target, options=FRESH):
    bundle = import_huggingface(source, target, options)
    bundle.save(target)
    return bundle


def assert_same_files(first, second):
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def pixels(count=3, side=IMAGE_SIZE):
    return torch.randint(0, 256, (count, 1, 3, side, side), dtype=torch.uint8)


def as_images(pixels_BFCYX):
    return [Image.fromarray(p[0].permute(1, 2, 0).numpy()) for p in pixels_BFCYX]


def stock_pixels(processor, pixels_BFCYX):
    return processor.image_processor(as_images(pixels_BFCYX), return_tensors="pt")["pixel_values"]


def copied(folder, target):
    """A folder to change; large files are links."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    return target


def write_large_encoder(encoder, folder):
    weights = {k: v + 0.2 * torch.randn(v.shape) for k, v in encoder.model.state_dict().items()}
    heads = encoder.model.blocks[0].attn.num_heads
    kept = {k: v for k, v in weights.items() if not k.startswith(("norm.", "fc_norm."))}
    write_timm_vit(folder, kept, num_heads=heads, preprocessing=encoder.preprocessing)


def eps_effect(notes):
    return float(next(note for note in notes if "eps" in note).split(" moves by ")[1].split(" ")[0])


@contextlib.contextmanager
def recorded_ids(language):
    """What our language model generates inside the block: one list of id rows a call."""
    calls, generate = [], language.model.generate

    def keep(*args, **kwargs):
        ids = generate(*args, **kwargs)
        calls.append(without_padding(ids, kwargs["pad_token_id"]))
        return ids

    language.model.generate = keep
    try:
        yield calls
    finally:
        del language.model.generate


def without_padding(ids, pad):
    """Rows as lists, padding at their ends taken off."""
    rows = ids.tolist()
    for row in rows:
        while row and row[-1] == pad:
            row.pop()
    return rows
