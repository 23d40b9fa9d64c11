import numpy as np
import pyarrow as pa
import pytest

from pipelines.data import schema
from pipelines.data.batches.batch import AUGMENTATION_SEED, IMAGE_ID, RANK, STEP
from pipelines.data.batches.plan import RowLookup, block_steps, evaluation_blocks, lacks_caption, training_blocks
from pipelines.data.order.global_batches import PADDING, Order, augmentation_seed, caption_index, rank_columns
from pipelines.data.order.mixture import Corpus, MixtureSource
from pipelines.data.order.row_index import PartRows, TableRows
from tests.pipelines.data.builders import manifest
from tests.pipelines.data.manifest_parts import row_contents, write_parts


def rows_of(images=9, videos=4):
    kinds = ["image"] * images + ["video"] * videos
    return TableRows(
        manifest(
            [
                {"sample_id": f"s{i}", "media": f"/{i}", "kind": kind, "captions": [f"a{i}", f"b{i}"]}
                for i, kind in enumerate(kinds)
            ]
        )
    )


@pytest.mark.parametrize(("world_size", "steps_per_block"), [(1, 1), (2, 3), (3, 2), (8, 8)])
def test_every_rank_looks_up_its_share(world_size, steps_per_block):
    corpus = Corpus([MixtureSource("", rows_of())])
    order = Order(corpus.streams("proportional"), 5, 4)
    steps = np.arange(4, 4 + 2 * order.steps_per_epoch)
    batches = order.at(steps)
    plans = training_blocks(batches, first_step=4, world_size=world_size, steps_per_block=steps_per_block)
    assert [plan[RANK][0].as_py() for plan in plans] == list(range(world_size)) * (len(plans) // world_size)
    look_up = RowLookup(corpus, seed=5, is_random=True)
    found: dict[tuple[int, int], list[dict]] = {}
    for plan in plans:
        table = look_up(plan)
        assert len(table) == len(plan)
        for row in table.to_pylist():
            found.setdefault((row[STEP], row[RANK]), []).append(row)
    for place, step in enumerate(steps.tolist()):
        for rank, columns in enumerate(rank_columns(4, world_size)):
            rows = found[step, rank]
            numbers = [PADDING if c == PADDING else batches.rows_SG[place, c] for c in columns]
            assert [row[schema.SAMPLE_ID] for row in rows] == [f"s{n}" if n != PADDING else "" for n in numbers]
            for row, column in zip(rows, columns, strict=True):
                assert row[schema.KIND] == batches.kinds[place]
                name, visit = row[schema.SAMPLE_ID], int(batches.visits_SG[place, column])
                if name:
                    chosen = "ab"[caption_index(5, visit, name, 2)]
                    assert row[schema.CAPTION] == chosen + name[1:]
                    assert row[AUGMENTATION_SEED] == augmentation_seed(5, visit, name)
                else:
                    assert (row[schema.MEDIA], row[schema.CAPTION], row[AUGMENTATION_SEED]) == (None, "", None)


def test_rows_without_caption_are_found_but_not_padding():
    texts = [["a"], [], [""]]
    table = manifest([{"sample_id": f"s{i}", "media": "/x", "captions": t} for i, t in enumerate(texts)])
    corpus = Corpus([MixtureSource("", TableRows(table))])
    (plan,) = training_blocks(
        Order(corpus.streams("proportional"), 0, 5).at(np.array([0])), first_step=0, world_size=1, steps_per_block=1
    )
    rows = RowLookup(corpus, seed=0, is_random=False)(plan)
    bad = [n for n, is_bad in zip(rows[schema.SAMPLE_ID].to_pylist(), lacks_caption(rows), strict=True) if is_bad]
    assert sorted(bad) == ["s1", "s2"] and rows[schema.SAMPLE_ID].to_pylist().count("") == 2


def test_evaluation_reads_every_row_once_piece_by_piece(tmp_path):
    folder = write_parts(tmp_path / "m", {("video", "val"): 700, ("image", "val"): 2500}, rows_per_part=1500)
    rows = PartRows(str(folder), "val")
    blocks = evaluation_blocks(rows, 64)
    first = next(blocks)
    begun_bytes = rows.bytes_read
    tables = [first, *blocks]
    assert 0 < begun_bytes < rows.bytes_read, "the second part is read when its rows are wanted"
    assert [table[STEP][0].as_py() for table in tables] == list(range(len(tables)))
    assert all(len(set(table[schema.KIND].to_pylist())) == 1 and len(table) <= 64 for table in tables)
    names = pa.concat_tables(tables)[schema.SAMPLE_ID].to_pylist()
    assert names == [row_contents(row)[schema.SAMPLE_ID] for row in [*range(700, 3200), *range(700)]]
    assert len(tables) == 40 + 11
    assert len(set(pa.concat_tables(tables)[IMAGE_ID].to_pylist())) == 3200


def test_small_micro_batches_share_a_block():
    assert [block_steps(size) for size in (1, 2**20, 2**22, 2**30)] == [8, 4, 1, 1]
