"""Caption files, or answer an instruction about them, in this process; a manifest goes through Ray Data."""

import logging
import sys

from jobs.evaluate.caption_corpus import caption_corpus
from jobs.folders.checkpoint import open_checkpoint
from jobs.settings.evaluate import CaptionSettings
from pipelines.data import storage
from pipelines.data.failures import MediaError
from pipelines.data.media.samples import SampleDecoder
from pipelines.data.storage.local_copies import local_folder
from pipelines.inference.decoding import decoding_of
from pipelines.inference.files import caption_file
from pipelines.inference.models import load_captioner
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
    decode = decoding_of(info, settings.limits, num_frames=settings.num_frames)
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
