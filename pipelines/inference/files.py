"""A trained bridge on files: open a run folder, then caption, ask about or embed images and videos by their paths.

Two lines suffice:

    captioner = open_captioner("runs/stage2")
    print(captioner.caption("photo.jpg"))

Dimensions: N query outputs of a clip, E joint width.
"""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pipelines.data import storage
from pipelines.data.failures import MediaError
from pipelines.data.media.clip import Clip
from pipelines.data.media.kinds import SNIFFED_BYTES, kind_of_name, sniff_kind
from pipelines.data.media.samples import Limits, SampleDecoder
from pipelines.data.storage.checkpoint_folders import whole_checkpoint
from pipelines.data.storage.retries import classify
from pipelines.inference.decoding import decoding_of, waveforms_of_clip
from pipelines.inference.models import Captioner, Retriever, load_captioner, load_retriever
from qformer.config import GenerationSettings


class _FileModel:
    """A model and the decoder of its files; closes the decoder's child processes at the end of a `with` block."""

    def __init__(self, decoder: SampleDecoder) -> None:
        self.decoder = decoder

    def close(self) -> None:
        """End the child processes that decode videos."""
        self.decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FileCaptioner(_FileModel):
    """Captions and answers about files, from a stage-2 checkpoint."""

    def __init__(self, captioner: Captioner, decoder: SampleDecoder) -> None:
        super().__init__(decoder)
        self.captioner = captioner

    def caption(self, path: str, instruction: str = "", generation: GenerationSettings | None = None) -> str:
        """Caption one image or video, or answer an instruction about it.

        Args:
            path: Local path or fsspec URI.
            instruction: Question or instruction; empty: the prompt of training.
            generation: Search or sampling; greedy by default.

        Raises:
            MediaError: If the file cannot be used.
        """
        return caption_file(self.captioner, self.decoder, path, generation or GenerationSettings(), instruction)


class FileRetriever(_FileModel):
    """Embeddings of files and texts, from a stage-1 checkpoint."""

    def __init__(self, retriever: Retriever, decoder: SampleDecoder) -> None:
        super().__init__(decoder)
        self.retriever = retriever

    def embed(self, path: str) -> Tensor:
        """Embed one image or video.

        Args:
            path: Local path or fsspec URI.

        Returns:
            [N, E], L2-normalised float32, one row for each query output.

        Raises:
            MediaError: If the file cannot be used.
        """
        pixels_BFCYX, is_frame_BF = _pixels(decode_file(self.decoder, path))
        return self.retriever.embed_image(pixels_BFCYX, is_frame_BF)[0][0]

    def embed_text(self, text: str) -> Tensor:
        """Embed one text.

        Returns:
            [E], L2-normalised float32. The similarity to a file is the largest product over the file's rows.
        """
        return self.retriever.embed_text([text])[0]

    def similarity(self, path: str, text: str) -> float:
        """Similarity of a file and a text, between -1 and 1: the largest cosine over the query outputs."""
        return (self.embed(path) @ self.embed_text(text)).max().item()


def open_captioner(run_or_checkpoint: str, device: str = "cpu") -> FileCaptioner:
    """Load the newest stage-2 checkpoint of a run.

    Args:
        run_or_checkpoint: Run folder or one checkpoint folder, local path or fsspec URI.
        device: Device of the models.

    Raises:
        UserError: If there is no such checkpoint, or a frozen model cannot be loaded.
    """
    captioner = load_captioner(whole_checkpoint(run_or_checkpoint), device)
    return FileCaptioner(captioner, SampleDecoder(decoding_of(captioner.info, Limits())))


def open_retriever(run_or_checkpoint: str, device: str = "cpu") -> FileRetriever:
    """Load the newest stage-1 checkpoint of a run.

    Args:
        run_or_checkpoint: Run folder or one checkpoint folder, local path or fsspec URI.
        device: Device of the models.

    Raises:
        UserError: If there is no such checkpoint, or a frozen model cannot be loaded.
    """
    retriever = load_retriever(whole_checkpoint(run_or_checkpoint), device)
    return FileRetriever(retriever, SampleDecoder(decoding_of(retriever.info, Limits())))


def caption_file(
    captioner: Captioner, decoder: SampleDecoder, path: str, generation: GenerationSettings, instruction: str = ""
) -> str:
    """Caption one file, or answer an instruction about it.

    Raises:
        MediaError: If the file cannot be used.
    """
    clip = decode_file(decoder, path)
    pixels_BFCYX, is_frame_BF = _pixels(clip)
    audio = waveforms_of_clip(clip)
    return captioner.answer(pixels_BFCYX, [instruction], generation, frame_valid=is_frame_BF, audio=audio)[0]


def decode_file(decoder: SampleDecoder, path: str) -> Clip:
    """Decode one image or video; its content decides which of the two it is.

    Raises:
        MediaError: If the file cannot be used.
    """
    return decoder.decode(kind=_kind(path), media=path)


def _pixels(clip: Clip) -> tuple[Tensor, Tensor]:
    """A batch of one: uint8 pixels, and False at frames that only repeat others."""
    return torch.tensor(clip.pixels)[None], torch.tensor(clip.frame_valid)[None]


def _kind(path: str) -> str:
    """Tell image from video by the content, as the server does; a GIF is a clip."""
    try:
        with storage.open_regular(path) as file:
            kind = sniff_kind(file.read(SNIFFED_BYTES))
    except OSError as error:
        raise classify(error, path) from error
    kind = kind or kind_of_name(path)
    if kind is None:
        raise MediaError("unsupported", "neither content nor name is that of an image or a video")
    return kind
