import numpy as np
import pyarrow as pa

from pipelines.data import schema
from pipelines.data.batches.batch import split_steps, unpack
from pipelines.data.batches.decode_rows import DecodeRows
from pipelines.data.batches.plan import RowLookup, block_steps, evaluation_blocks, training_blocks
from pipelines.data.corpus.quarantine import accounting_line, from_table, to_table
from pipelines.data.order.global_batches import PADDING, StepRows, caption_index
from pipelines.data.order.row_index import TableRows
from tests.pipelines.data.builders import DECODE, image_manifest, manifest, write_clip


def _blocks(table, batches, *, world_size=2, epochs=None, is_random=False):
    """What the decode operator gets for these steps of row numbers, from step 5 on."""
    rows_SG = np.array(batches)
    kinds = [table[schema.KIND][int(row)].as_py() for row in rows_SG[:, 0]]
    visits_SG = np.broadcast_to(np.zeros((1, 1)) if epochs is None else epochs[:, None], rows_SG.shape).astype(np.int64)
    plans = training_blocks(StepRows(rows_SG, visits_SG, kinds), first_step=5, world_size=world_size, steps_per_block=2)
    look_up = RowLookup(TableRows(table), seed=0, is_random=is_random)
    return [look_up(plan) for plan in plans]


def _evaluated(table, batch_size):
    return list(evaluation_blocks(TableRows(table), batch_size))


def test_a_block_of_images_and_clips_travels_whole(tmp_path):
    """Two steps of different kinds share a block; padding and a missing file keep their places."""
    images = image_manifest(tmp_path, 2)
    clip = write_clip(tmp_path / "c.mp4", [100] * 4)
    others = manifest(
        [
            {"sample_id": "clip", "media": str(clip), "kind": "video", "captions": ["moves"]},
            {"sample_id": "gone", "media": str(tmp_path / "gone.mp4"), "kind": "video"},
        ]
    )
    table = pa.concat_tables([images, others])
    blocks = _blocks(table, [[0, 1, PADDING], [2, 3, PADDING]], world_size=1)
    assert len(blocks) == 1
    packed = DecodeRows(DECODE)(blocks[0])
    first, second = (unpack(part) for part in split_steps(packed))

    assert (first.step, second.step, first.rank) == (5, 6, 0)
    assert first.sample_ids == ["s0", "s1", ""] and second.sample_ids == ["clip", "gone", ""]
    assert first.is_valid.tolist() == [True, True, False]
    assert second.is_valid.tolist() == [True, False, False]
    assert first.images.shape == (3, 1, 3, 32, 32) and second.images.shape == (3, 4, 3, 32, 32)
    assert first.captions[0] == f"{'ab'[caption_index(0, 0, 's0', 2)]}0" and first.captions[2] == ""
    assert not first.images[2].any() and not second.images[1:].any() and second.images[0].mean() > 90
    assert first.images.flags.writeable
    (failure,) = second.failures
    assert (failure.sample_id, failure.stage, failure.error_class) == ("gone", "read", "missing")


def test_each_sample_brings_the_instruction_of_its_caption(tmp_path):
    """One for each caption, one for all, none; padding has none; over epochs every pair comes up."""
    table = image_manifest(tmp_path, 3)
    instructions = pa.array([["which", "where"], ["what"], []], pa.list_(pa.string()))
    place = table.schema.get_field_index(schema.INSTRUCTIONS)
    table = table.set_column(place, table.schema.field(place), instructions)
    pairs = set()
    for epoch in range(12):
        (block,) = _blocks(table, [[0, 1, 2, PADDING]], world_size=1, epochs=np.array([epoch]))
        batch = unpack(DecodeRows(DECODE)(block))
        pairs.add((batch.captions[0], batch.instructions[0]))
        assert batch.instructions[1:] == ["what", "", ""]
    assert pairs == {("a0", "which"), ("b0", "where")}
    (block,) = _evaluated(table, 8)
    assert unpack(DecodeRows(DECODE)(block)).instructions == ["which", "what", ""]


def test_ranks_of_a_clip_batch_agree_on_the_number_of_frames(tmp_path):
    """Also a rank that gets nothing but padding: its tensors are gathered with the others'."""
    clip = write_clip(tmp_path / "c.mp4", [100] * 4)
    table = manifest([{"sample_id": "clip", "media": str(clip), "kind": "video"}])
    packed = [DecodeRows(DECODE)(block) for block in _blocks(table, [[0, PADDING, PADDING, PADDING]])]
    assert [unpack(block).images.shape for block in packed] == [(2, 4, 3, 32, 32)] * 2
    assert [unpack(block).is_valid.tolist() for block in packed] == [[True, False], [False, False]]


def test_blocks_are_dealt_to_ranks_in_turn(tmp_path):
    table = image_manifest(tmp_path, 4)
    blocks = _blocks(table, [[0, 1], [2, 3], [1, 0]])
    assert [(b["step"].to_pylist(), b["rank"].to_pylist()) for b in blocks] == [
        ([5, 6], [0, 0]),
        ([5, 6], [1, 1]),
        ([7], [0]),
        ([7], [1]),
    ]


def test_each_step_has_its_epochs_captions(tmp_path):
    table = image_manifest(tmp_path, 1)
    blocks = _blocks(table, [[0]] * 20, world_size=1, epochs=np.arange(20))
    captions = [text for block in blocks for text in block["caption"].to_pylist()]
    assert captions == [f"{'ab'[caption_index(0, epoch, 's0', 2)]}0" for epoch in range(20)]


def test_augmentation_seeds_are_drawn_only_when_used(tmp_path):
    table = image_manifest(tmp_path, 2)
    (plain,) = _blocks(table, [[0, 1]], world_size=1)
    (drawn,) = _blocks(table, [[0, 1]], world_size=1, is_random=True)
    assert plain["augmentation_seed"].null_count == 2
    assert len(set(drawn["augmentation_seed"].to_pylist())) == 2


def test_image_ids_tell_media_and_parts_apart():
    table = manifest(
        [
            {"sample_id": "a", "media": "/x.mp4"},
            {"sample_id": "b", "media": "/x.mp4"},
            {"sample_id": "c", "media": "/x.mp4", "start_s": 1.0, "end_s": 2.0},
            {"sample_id": "d", "media": "/y.mp4"},
            {"sample_id": "e", "media_bytes": b"1"},
            {"sample_id": "f", "media_bytes": b"2"},
        ]
    )
    (block,) = _evaluated(table, 10)
    a, b, *others = block["image_id"].to_pylist()
    assert a == b and len({a, *others}) == 5


def test_evaluation_blocks_hold_every_row_once_and_one_kind():
    rows = [{"sample_id": f"s{i}", "media": "/x", "kind": ("image", "video")[i % 3 == 0]} for i in range(20)]
    blocks = _evaluated(manifest(rows), 4)
    assert [len(set(block[schema.KIND].to_pylist())) for block in blocks] == [1] * len(blocks)
    assert sorted(name for block in blocks for name in block[schema.SAMPLE_ID].to_pylist()) == sorted(
        row["sample_id"] for row in rows
    )


def test_small_micro_batches_share_blocks():
    assert block_steps(1000) == 8 and block_steps(2**21) == 2 and block_steps(2**30) == 1


def test_quarantine_tables_keep_failures(tmp_path):
    table = manifest([{"sample_id": "gone", "media": str(tmp_path / "gone.jpg")}])
    batch = unpack(DecodeRows(DECODE)(_evaluated(table, 1)[0]))
    quarantined = to_table(batch.failures, epoch=3)
    assert quarantined[schema.EPOCH].to_pylist() == [3]
    assert from_table(quarantined) == batch.failures
    assert accounting_line(1000, 990, 10) == "rows in 1000 = rows used 990 + rows quarantined 10"


def test_repeated_frames_are_marked(tmp_path):
    """Two frames where four are wanted: two of the four only repeat; a failed row keeps all, for its row is masked."""
    clip = write_clip(tmp_path / "a.mp4", [50, 150])
    table = manifest(
        [
            {"sample_id": "short", "media": str(clip), "kind": "video"},
            {"sample_id": "gone", "media": str(tmp_path / "gone.mp4"), "kind": "video"},
        ]
    )
    batch = unpack(DecodeRows(DECODE)(_evaluated(table, 2)[0]))
    assert batch.is_valid.tolist() == [True, False]
    assert batch.frame_valid.tolist() == [[True, False, True, False], [True] * 4]
