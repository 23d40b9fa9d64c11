"""Model checks of `qformer doctor`: scores of true and permuted pairs, and digests of the frozen models."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from jobs.doctor.run_records import RunRecords
from jobs.evaluate.job import decode_settings as evaluation_decoding
from jobs.settings.data import DataSettings
from jobs.settings.evaluate import DoctorSettings
from jobs.settings.train import TrainSettings
from jobs.train.checks import manifests
from jobs.train.inputs import decode_settings
from pipelines.data.media.samples import DecodeSettings, Limits
from pipelines.data.media.transforms import Augmentation
from pipelines.data.order.mixture import Corpus, open_corpus
from pipelines.evaluation.doctor import model as model_findings
from pipelines.evaluation.doctor.findings import Finding
from pipelines.evaluation.doctor.pairs import PairSample
from pipelines.evaluation.doctor.probe import ModelFigures, probe_captioner, probe_retriever
from pipelines.inference.decoding import decoding_of
from pipelines.inference.models import load_captioner, load_retriever
from pipelines.training.step.precision import DTYPES
from qformer.audio import load_audio
from qformer.backbones import load_language, load_vision, weights_fingerprint
from qformer.bridges.table import build_bridge
from qformer.config import AudioSpec, LanguageSpec
from qformer.conversion.checkpoint import BridgeInfo, read_info
from qformer.errors import UserError

EVALUATION_SPLITS = ("val", "validation", "dev", "test")
"""Splits to look for in the run's manifest, in this order, if its settings have no validation."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRows:
    """Source of the pairs."""

    corpus: Corpus
    decode: DecodeSettings
    name: str
    """Name in messages."""


def pair_findings(settings: DoctorSettings, records: RunRecords, checkpoint: Path) -> list[Finding]:
    """Findings about a checkpoint from its scores of true and permuted pairs.

    Raises:
        UserError: If the rows that the user chose cannot be read.
    """
    info = read_info(checkpoint)
    if settings.data is None:
        try:
            rows = _own_rows(records.settings, info)
        except UserError as error:
            return [_not_checked(str(error), "name rows to look at with data.manifest and data.split")]
    else:
        rows = _chosen_rows(settings.data, info)
    sample = PairSample(rows.corpus, rows.decode, settings.rows, settings.batch_size, settings.seed)
    logger.info("probing %d rows of %s", min(settings.rows, rows.corpus.num_rows), rows.name)
    try:
        figures = _probe(settings, info, checkpoint, sample)
    except (UserError, ValueError) as error:  # a backbone that is gone; features that are not finite
        return [_not_checked(str(error), "make the run's backbones available as they were in training")]
    if not figures.num_texts:
        why = sample.failures[0].message if sample.failures else "there are none"
        return [_not_checked(f"no row of {rows.name} could be decoded ({why})", "name other rows with data.manifest")]
    return [
        model_findings.image_use(figures, rows=rows.name, weights=records.loss_weights),
        *model_findings.queries(figures),
        model_findings.texts_cut(figures),
    ]


def _probe(settings: DoctorSettings, info: BridgeInfo, checkpoint: Path, sample: PairSample) -> ModelFigures:
    use_gpu = torch.cuda.is_available() if settings.use_gpu is None else settings.use_gpu
    device = "cuda" if use_gpu else "cpu"
    if info.stage == 1:
        return probe_retriever(load_retriever(checkpoint, device), sample, settings.seed)
    return probe_captioner(load_captioner(checkpoint, device), sample, settings.seed)


def frozen_now(
    info: BridgeInfo, weights: Mapping[str, Tensor], recorded: Mapping[str, str], precision: str | None
) -> dict[str, list[str] | str]:
    """SHA-256 of each recorded frozen model as it is loaded now.

    A run loads its backbones in its precision, a feature cache in the encoder's own. So models are loaded in one dtype
    after another until a digest equals the recorded one.

    Args:
        info: Description of the newest checkpoint.
        weights: Weights of the newest checkpoint, which include a frozen Q-Former.
        recorded: Recorded SHA-256 by name.
        precision: Precision of the run; None: unknown.

    Returns:
        Digests in the dtypes that were tried, or the reason why the model cannot be loaded, by name.
    """
    first = DTYPES.get(precision or "fp32") or torch.float32
    dtypes = list(dict.fromkeys([first, torch.float32, torch.bfloat16, torch.float16]))
    found: dict[str, list[str] | str] = {}
    for name in sorted({"vision", "audio", "language"} & recorded.keys()):
        digests: list[str] = []
        try:
            for dtype in dtypes:
                if recorded[name] not in digests:
                    digests.append(_fingerprint(name, info, dtype))
            found[name] = digests
        except UserError as error:
            found[name] = str(error)
    with torch.device("meta"):
        bridge = build_bridge(info.bridge, info.qformer)
    own: dict[str, list[str]] = {}
    for parts in (bridge.frozen_parts(is_whole=True), bridge.frozen_parts(is_whole=False)):
        for name in parts.keys() & recorded.keys():
            own.setdefault(name, []).append(weights_fingerprint(_of_part(bridge, parts[name], weights)))
    return found | own


def _of_part(bridge: nn.Module, part: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a part of a bridge, by the part's own names."""
    place = next(name for name, module in bridge.named_modules() if module is part)
    return {name: weights[f"{place}.{name}" if place else name] for name in part.state_dict()}


def _fingerprint(name: str, info: BridgeInfo, dtype: torch.dtype) -> str:
    if name == "language":
        return weights_fingerprint(load_language(cast(LanguageSpec, info.language), dtype=dtype)[0])
    if name == "audio":
        return weights_fingerprint(load_audio(cast(AudioSpec, info.audio), dtype=dtype))
    return weights_fingerprint(load_vision(info.vision, dtype=dtype))


def _own_rows(settings: TrainSettings | None, info: BridgeInfo) -> ProbeRows:
    """ProbeRows that the run did not train on where its manifest has some, else rows of its training."""
    if settings is None:
        raise UserError("settings.yaml is missing, or of another version")
    audio = decoding_of(info, Limits()).audio
    decode = dataclasses.replace(decode_settings(settings, info.preprocessing, audio), augmentation=Augmentation())
    data, validation = settings.data, settings.validation
    own = [path for path, _ in manifests(settings)]
    if validation is not None:
        paths = own if validation.manifest is None else [validation.manifest]
        return ProbeRows(
            corpus=_opened(paths, validation.split, data.kind), decode=decode, name=f"split {validation.split!r}"
        )
    for split in EVALUATION_SPLITS:
        try:
            if split != data.split:
                return ProbeRows(corpus=_opened(own, split, data.kind), decode=decode, name=f"split {split!r}")
        except UserError:
            continue  # which says that there is no such split, or whatever the next line will say again
    name = f"split {data.split!r} (trained on: pairs learnt by heart look like use)"
    return ProbeRows(corpus=_opened(own, data.split, data.kind), decode=decode, name=name)


def _chosen_rows(data: DataSettings, info: BridgeInfo) -> ProbeRows:
    name = f"split {data.split!r} of {data.manifest}"
    return ProbeRows(
        corpus=_opened([data.manifest], data.split, data.kind), decode=evaluation_decoding(data, info), name=name
    )


def _opened(paths: list[str], split: str, kind: str | None) -> Corpus:
    return open_corpus([(path, None) for path in paths], split=split, kind=kind)


def _not_checked(why: str, advice: str) -> Finding:
    return Finding(topic="image use", status="unknown", text=f"could not be checked: {why}", advice=advice)
