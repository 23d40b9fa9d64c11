"""Captions of a whole corpus, shard by shard: an actor that writes them, and the check that a shard is up to date.

A shard is one Parquet file of consecutive manifest rows of one kind, each with its text or its failure. It is written
atomically, and the manifest alone decides which rows it holds, so a killed job leaves nothing to repair.
"""

import time
from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor

from pipelines.data import schema, storage
from pipelines.data.batches.batch import SampleBatch, unpack
from pipelines.data.corpus.quarantine import require_readable
from pipelines.data.failures import Failure
from pipelines.data.features.files import FAILURE_COLUMNS, SOURCE, STATE, read_table, rows_file, write_table
from pipelines.data.features.shard_encoder import queued_seconds
from pipelines.data.features.shards import is_current, shard_blocks
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.media.stage_costs import cost_columns
from pipelines.data.storage.local_copies import local_folder
from pipelines.inference.decoding import waveforms_of
from pipelines.inference.models import Captioner, load_captioner
from qformer.config import GenerationSettings
from qformer.generation.completion import Completion, complete
from qformer.generation.engine import Engine
from qformer.generation.requests.inputs import prompt_inputs
from qformer.generation.requests.request import EngineRequest, RequestSettings

TEXT, FINISH_REASON, NUM_TOKENS, IS_TRUNCATED = "text", "finish_reason", "num_tokens", "is_truncated"
SHARD_SCHEMA = pa.schema(
    [
        (schema.SAMPLE_ID, pa.string()),
        (schema.MEDIA, pa.string()),
        (schema.INSTRUCTION, pa.string()),
        (TEXT, pa.string()),
        (FINISH_REASON, pa.string()),
        (NUM_TOKENS, pa.int32()),
        (IS_TRUNCATED, pa.bool_()),
        (SOURCE, pa.int64()),
        (STATE, pa.string()),
        (schema.STAGE, pa.string()),
        (schema.ERROR_CLASS, pa.string()),
        (schema.MESSAGE, pa.string()),
        (schema.TRIES, pa.int32()),
    ]
)
"""Columns of a shard. `text` to `is_truncated` (whether the instruction was truncated) are null in rows without a text;
`stage` and all after it are null in the others."""

MODEL_FAILURE = "model"
"""Error class of rows on which the model fails."""
_MAX_ROWS = 256
"""Largest shard, and thus what a killed job repeats at most, per actor."""
_FRAMES_PER_PASS = 64


def caption_blocks(manifest: pa.Table, decode: DecodeSettings, instruction: str) -> list[pa.Table]:
    """Split a manifest into shards.

    Args:
        manifest: Manifest of the corpus.
        decode: Decode settings.
        instruction: Instruction for all rows, in index of their own; "" keeps those.
    """
    blocks = shard_blocks(manifest, decode, _MAX_ROWS)
    if not instruction:
        return blocks
    indices = [block.schema.get_field_index(schema.INSTRUCTION) for block in blocks]
    texts_of_blocks = [pa.array([instruction] * len(block), pa.string()) for block in blocks]
    columns = zip(blocks, indices, texts_of_blocks, strict=True)
    return [block.set_column(index, schema.INSTRUCTION, texts) for block, index, texts in columns]


def is_shard_current(folder: str, shard: int, rows: pa.Table) -> bool:
    """Whether a shard exists with these rows and instructions, current files, and no transient failure.

    Args:
        folder: Folder of the captions.
        shard: Number of the shard.
        rows: Rows of the shard, from `caption_blocks`.
    """
    path = storage.join(folder, rows_file(shard))
    if not storage.exists(path):
        return False
    found = read_table(path)
    return is_current(found, rows) and found[schema.INSTRUCTION].to_pylist() == rows[schema.INSTRUCTION].to_pylist()


def remove_other_shards(folder: str, num_shards: int) -> None:
    """Remove shards left from a longer manifest."""
    expected = {rows_file(shard) for shard in range(num_shards)}
    for name in storage.folder_names(folder):
        if name.startswith("shard-") and name.endswith(".parquet") and name not in expected:
            storage.remove_file(storage.join(folder, name))


class CaptionShards:
    """Actor that captions a decoded shard, or answers its instructions, and writes it.

    Args:
        checkpoint: Folder or URI of a stage-2 checkpoint.
        folder: Folder of the captions.
        generation: Generation settings, without beam search.
        kv_tokens: Size of the key-value cache in tokens.
        max_requests: Answers generated at once.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        checkpoint: str,
        folder: str,
        generation: GenerationSettings,
        kv_tokens: int,
        max_requests: int,
        device: str,
    ) -> None:
        self._captioner: Captioner = load_captioner(local_folder(checkpoint), device=device)
        self._folder, self._settings = folder, RequestSettings.of(generation)
        self._engine = Engine(self._captioner.language, kv_tokens=kv_tokens, max_requests=max_requests)
        self._idle_since_s = time.perf_counter()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Write one shard, given the output of `DecodeShards`.

        Returns:
            One row of counts and costs, in the format of `EncodeShards`.
        """
        wait_s, queued_s = time.perf_counter() - self._idle_since_s, queued_seconds(block)
        batch = unpack(block)
        require_readable(batch.failures)
        with batch.costs.measure("encode"):
            inputs = self._inputs(batch)
        with batch.costs.measure("generate"):
            results = self._generate(inputs)
        with batch.costs.measure("write"):
            table = _shard_table(block, batch, results, self._is_truncated(batch))
            write_table(table, storage.join(self._folder, rows_file(batch.step)))
        failed = table[schema.ERROR_CLASS].null_count
        counts = {"rows": len(table), "failed": len(table) - failed, "wait_s": wait_s, "queued_s": queued_s}
        self._idle_since_s = time.perf_counter()
        return pa.table({**{name: [value] for name, value in counts.items()}, **cost_columns([batch.costs])})

    def _inputs(self, batch: SampleBatch) -> list[Tensor | Exception | None]:
        """Engine input of each row, or the error of its encoding; None where the row was not decoded."""
        inputs: list[Tensor | Exception | None] = [None] * len(batch.sample_ids)
        valid = [row for row, is_valid in enumerate(batch.is_valid) if is_valid]
        rows_per_pass = max(1, _FRAMES_PER_PASS // batch.images.shape[1])
        for start in range(0, len(valid), rows_per_pass):
            rows = valid[start : start + rows_per_pass]
            for row, found in zip(rows, self._pass(batch, rows), strict=True):
                inputs[row] = found
        return inputs

    def _pass(self, batch: SampleBatch, rows: Sequence[int]) -> list[Tensor | Exception]:
        """Engine inputs of some rows; a pass that fails is repeated row by row."""
        pixels, frame_valid = torch.from_numpy(batch.images[rows]), torch.from_numpy(batch.frame_valid[rows])
        instructions = [batch.instructions[row] for row in rows]
        try:
            prefixes = self._captioner.soft_prompts(
                pixels, instructions, frame_valid=frame_valid, audio=waveforms_of(batch, rows)
            )
        except Exception as error:
            return [error] if len(rows) == 1 else [one for row in rows for one in self._pass(batch, [row])]
        prompts = self._captioner.prompts(instructions, len(rows))
        language = self._captioner.language
        return [prompt_inputs(language, prefix, text) for prefix, text in zip(prefixes, prompts, strict=True)]

    def _generate(self, inputs: Sequence[Tensor | Exception | None]) -> list[Completion | Exception | None]:
        rows = [row for row, found in enumerate(inputs) if isinstance(found, Tensor)]
        requests = [EngineRequest(inputs_SL=inputs[row], settings=self._settings) for row in rows]  # type: ignore[arg-type]
        results: list[Completion | Exception | None] = [
            None if isinstance(found, Tensor) else found for found in inputs
        ]
        for row, result in zip(rows, complete(self._engine, requests), strict=True):
            results[row] = result
        return results

    def _is_truncated(self, batch: SampleBatch) -> list[bool]:
        cut = {text: self._captioner.num_truncated([text]) > 0 for text in set(batch.instructions)}
        return [cut[text] for text in batch.instructions]


def _shard_table(
    block: pa.Table, batch: SampleBatch, results: Sequence[Completion | Exception | None], is_truncated: Sequence[bool]
) -> pa.Table:
    """Table of a shard: every row once, with its text or its failure."""
    failures = {failure.sample_id: failure for failure in batch.failures}
    media = block[schema.MEDIA].to_pylist()
    rows = []
    for index, (sample_id, result) in enumerate(zip(batch.sample_ids, results, strict=True)):
        text, failure = (result, None) if isinstance(result, Completion) else (None, failures.get(sample_id))
        if isinstance(result, Exception):
            failure = Failure(sample_id, media[index], "generate", MODEL_FAILURE, str(result))
        assert (text is None) != (failure is None), f"{sample_id} has neither a text nor a failure"
        rows.append(
            {
                schema.SAMPLE_ID: sample_id,
                schema.MEDIA: media[index],
                schema.INSTRUCTION: batch.instructions[index],
                TEXT: text and text.text,
                FINISH_REASON: text and text.finish_reason,
                NUM_TOKENS: text and text.usage.completion_tokens,
                IS_TRUNCATED: None if text is None else is_truncated[index],
                SOURCE: int(batch.image_ids[index]),
                STATE: block[STATE][index].as_py(),
                **{column: failure and getattr(failure, column) for column in FAILURE_COLUMNS},
            }
        )
    return pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
