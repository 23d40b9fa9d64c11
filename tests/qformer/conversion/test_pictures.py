"""Pictures on their way into an exported folder's stock processor, and into our own encoder: how far apart they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data.media.samples import DecodeSettings, SampleDecoder
from pipelines.data.media.transforms import resize_and_crop
from pipelines.inference.models import load_captioner
from qformer.config import GenerationSettings
from qformer.conversion.frozen import image_processor_for
from qformer.preprocessing import Preprocessing
from tests.qformer.folders import recorded_ids, without_padding
from tests.tiny_huggingface import NUM_QUERIES

PICTURES = {
    # width x height of a JPEG -> by stock's way of resizing: largest and mean difference of ours, in levels of 255.
    # Decoded in full; Pillow resizes as ours does, torchvision rounds otherwise (measured 1 and 0.22).
    (83, 61): {"pil": (0, 0.0), "torchvision": (2, 0.3)},
    (61, 107): {"pil": (0, 0.0), "torchvision": (2, 0.3)},
    # Ours lets JPEG decode to a half where that still is twice the encoder's size (measured 6 and 0.92).
    (447, 301): {"pil": (9, 1.2), "torchvision": (9, 1.2)},
}
IN_FULL = [size for size in PICTURES if size != (447, 301)]


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("size", PICTURES, ids=str)
def test_odd_sized_jpegs_through_the_stock_processor(folders, tmp_path, size, backend):
    """From the file to the tokens, on both sides' own way."""
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    _, _, ours, exported, _, _ = folders["Blip2ForConditionalGeneration"]
    captioner = load_captioner(ours)
    decoder = SampleDecoder(DecodeSettings(preprocessing=captioner.preprocessing, num_frames=1))
    files = [write_jpeg(tmp_path / f"{seed}.jpg", size, seed) for seed in range(4)]
    decoded = torch.stack([torch.tensor(decoder.decode(kind="image", media=str(file)).pixels) for file in files])
    decoder.close()
    processor = AutoProcessor.from_pretrained(exported, backend=backend)
    assert processor.image_processor.backend == backend
    scaled = processor.image_processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    mean, std = captioner.encoder.mean_1C11, captioner.encoder.std_1C11
    levels = ((scaled * std + mean) * 255 - decoded[:, 0]).abs().round()
    worst, average = PICTURES[size][backend]
    assert levels.max() <= worst and levels.mean() <= average
    if size not in IN_FULL:
        return  # a level on average is more than random weights forgive
    model = Blip2ForConditionalGeneration.from_pretrained(exported)
    ids = model.generate(scaled, max_new_tokens=8, do_sample=False)[:, NUM_QUERIES + 1 :]
    with recorded_ids(captioner.language) as calls:
        captioner.answer(decoded, settings=GenerationSettings(max_new_tokens=8))
    assert calls == [without_padding(ids, processor.tokenizer.pad_token_id)]
    assert len({tuple(row) for row in calls[0]}) > 1


def write_jpeg(file, size, seed):
    """Soft shapes with a little noise, as in a photograph."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse).astype(float) + random.normal(0, 6, (size[1], size[0], 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return file


@pytest.mark.parametrize(("width", "shift"), [(60, 0), (61, 0), (62, 0), (63, 1), (65, 0), (67, 1)])
def test_stock_cuts_a_centre_crop_up_to_a_pixel_aside(width, shift):
    """torchvision (as timm, and ours) rounds half of the margin, half to even; transformers rounds it down."""
    from transformers import CLIPImageProcessor

    contract = Preprocessing(
        height=56, width=56, resize_short_side=56, interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3
    )
    processor = image_processor_for(contract)
    assert isinstance(processor, CLIPImageProcessor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, width, 3), dtype=np.uint8))
    stock = (processor(image, return_tensors="pt")["pixel_values"][0] * 255).round().to(torch.uint8)
    ours = torch.from_numpy(resize_and_crop(image, contract))
    assert torch.equal(ours[..., : 56 - shift], stock[..., shift:])
