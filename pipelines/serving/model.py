"""The model deployment: decoded pixels in, captions out."""

import asyncio
import logging
from collections import defaultdict

import numpy as np
import torch
from ray import serve

from pipelines.data.local_copies import local_folder
from pipelines.serving.config import ServingConfig
from qformer.bridge import Captioner, load_captioner
from qformer.config import GenerationSettings

logger = logging.getLogger(__name__)


class GenerationError(RuntimeError):
    """The model failed on one sample."""


def caption_samples(
    captioner: Captioner, samples: list[np.ndarray], generation: GenerationSettings
) -> list[str | None]:
    """Caption samples of mixed length; samples of equal shape share a pass.

    A group that fails is tried again sample by sample, so that one sample cannot fail its neighbours.

    Args:
        captioner: The model.
        samples: uint8 [T, 3, H, W] each.
        generation: How captions are generated.

    Returns:
        One caption for each sample in order; None where the model failed on it.
    """
    places = defaultdict(list)
    for place, sample in enumerate(samples):
        places[sample.shape].append(place)
    captions: list[str | None] = [None] * len(samples)
    for group in places.values():
        try:
            answers: list[str | None] = [*_caption(captioner, [samples[place] for place in group], generation)]
        except Exception:
            logger.exception("captioning %d samples failed; trying them one by one", len(group))
            answers = [_caption_alone(captioner, samples[place], generation) for place in group]
        for place, answer in zip(group, answers, strict=True):
            captions[place] = answer
    return captions


def _caption(captioner: Captioner, samples: list[np.ndarray], generation: GenerationSettings) -> list[str]:
    return captioner.answer(torch.from_numpy(np.stack(samples)), settings=generation)


def _caption_alone(captioner: Captioner, sample: np.ndarray, generation: GenerationSettings) -> str | None:
    try:
        return _caption(captioner, [sample], generation)[0]
    except Exception:
        logger.exception("captioning a sample of shape %s failed", sample.shape)
        return None


class CaptionModel:
    """One replica: a captioner that answers requests in batches."""

    def __init__(self, config: ServingConfig) -> None:
        device = "cuda" if config.use_gpu else "cpu"
        self._captioner = load_captioner(local_folder(config.checkpoint), device=device)
        if self._captioner.num_truncated([""]):
            logger.warning("the checkpoint's prompt is cut to max_text_tokens, as in training")
        self._generation = config.generation
        self._generate.set_max_batch_size(config.max_batch_size)
        self._generate.set_batch_wait_timeout_s(config.batch_wait_s)

    async def ping(self) -> bool:
        """Answer that the replica lives and its model is loaded."""
        return True

    async def caption(self, pixels: np.ndarray) -> str:
        """Caption one sample.

        Args:
            pixels: uint8 [T, 3, H, W].

        Raises:
            GenerationError: If the model fails on this sample.
        """
        answer = await self._generate(pixels)
        if answer is None:
            raise GenerationError(f"the model failed on a sample of shape {pixels.shape}")
        return answer

    @serve.batch  # type: ignore[untyped-decorator]
    async def _generate(self, samples: list[np.ndarray]) -> list[str | None]:
        # In a thread, so that health checks and new requests are answered during generation.
        return await asyncio.to_thread(caption_samples, self._captioner, samples, self._generation)
