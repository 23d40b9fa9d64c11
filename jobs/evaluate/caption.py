"""Caption files, or answer an instruction about them, in this process; a manifest goes through Ray Data."""

import logging
import sys

import torch

from jobs.evaluate.caption_corpus import caption_corpus
from jobs.folders.checkpoint import open_checkpoint
from jobs.settings.jobs import CaptionSettings
from pipelines.data import storage
from pipelines.data.failures import SNIFFED_BYTES, MediaError, kind_of_name, sniff_kind
from pipelines.data.media.samples import Limits, SampleDecoder
from pipelines.data.storage.local_copies import local_folder
from pipelines.data.storage.retries import classify
from pipelines.inference.decoding import decoding_of, waveforms_of_clip
from pipelines.inference.models import Captioner, load_captioner
from qformer.config import GenerationSettings
from qformer.errors import UserError

logger = logging.getLogger(__name__)


def main(settings: CaptionSettings) -> int:
    """Print `path<TAB>caption` for each file; a file that cannot be used is reported on stderr and skipped.

    With a manifest, the captions go into a folder (`caption_corpus`).

    Returns:
        The exit code: 0, or 1 if a file could not be used.

    Raises:
        UserError: If a file does not exist, or the checkpoint cannot be used.
    """
    if settings.manifest is not None:
        caption_corpus(settings)
        return 0
    for path in settings.media:
        if not storage.exists(path):
            raise UserError(f"media: no file at {path}; give the path of an image or a video")
    checkpoint, info = open_checkpoint(settings.checkpoint)
    decode = decoding_of(info, Limits(**settings.limits.model_dump()), num_frames=settings.num_frames)
    captioner = load_captioner(local_folder(checkpoint))
    if captioner.num_truncated([settings.instruction]):
        logger.warning("instruction: cut to max_text_tokens=%d, as in training", info.max_text_tokens)
    decoder = SampleDecoder(decode)
    num_failed = 0
    try:
        for path in settings.media:
            try:
                text = caption_file(captioner, decoder, path, settings.generation, settings.instruction)
                print(f"{path}\t{text}", flush=True)
            except MediaError as error:
                print(f"{path}: {error}", file=sys.stderr, flush=True)
                num_failed += 1
    finally:
        decoder.close()
    return 1 if num_failed else 0


def caption_file(
    captioner: Captioner, decoder: SampleDecoder, path: str, generation: GenerationSettings, instruction: str = ""
) -> str:
    """Caption one file, or answer an instruction about it.

    Raises:
        MediaError: If the file cannot be used.
    """
    clip = decoder.decode(kind=_kind(path), media=path)
    pixels, frame_valid = torch.tensor(clip.pixels)[None], torch.tensor(clip.frame_valid)[None]
    audio = waveforms_of_clip(clip)
    return captioner.answer(pixels, [instruction], generation, frame_valid=frame_valid, audio=audio)[0]


def _kind(path: str) -> str:
    """Detect image or video by the content, as the server does; a GIF is a clip."""
    try:
        with storage.open_regular(path) as file:
            kind = sniff_kind(file.read(SNIFFED_BYTES))
    except OSError as error:
        raise classify(error, path) from error
    kind = kind or kind_of_name(path)
    if kind is None:
        raise MediaError("unsupported", "neither content nor name is that of an image or a video")
    return kind
