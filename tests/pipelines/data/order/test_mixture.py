import numpy as np
import pytest

from pipelines.data import schema
from pipelines.data.batches.plan import image_ids
from pipelines.data.corpus.manifest import write_table
from pipelines.data.order.global_batches import PADDING, Order
from pipelines.data.order.mixture import Corpus, MixtureSource, epoch_draws, open_corpus, source_names
from pipelines.data.order.row_index import PartRows, TableRows
from qformer.errors import UserError
from tests.pipelines.data.builders import manifest
from tests.pipelines.data.manifest_parts import row_contents, write_parts


def rows_of(images, videos=0, name="s"):
    kinds = ["image"] * images + ["video"] * videos
    return TableRows(manifest([{"sample_id": f"{name}{i}", "media": f"/{i}", "kind": k} for i, k in enumerate(kinds)]))


@pytest.mark.parametrize(
    ("mixing", "weights", "draws"),
    [
        ("proportional", [None, None], [900, 100]),
        ("sqrt", [None, None], [750, 250]),
        ("explicit", [1.0, 3.0], [250, 750]),
        ("explicit", [1e6, 1e-6], [1000, 1]),  # a source that was named is never left out
    ],
)
def test_an_epoch_takes_so_many(mixing, weights, draws):
    assert epoch_draws([900, 100], mixing, weights) == draws


def test_weights_stand_where_they_count():
    with pytest.raises(UserError, match="explicit needs a weight for every entry"):
        epoch_draws([5, 5], "explicit", [1.0, None])
    with pytest.raises(UserError, match="sqrt makes its own weights"):
        epoch_draws([5, 5], "sqrt", [1.0, None])


@pytest.mark.parametrize(
    ("mixing", "weights", "draws"),
    [("proportional", (None, None), (36, 9)), ("sqrt", (None, None), (30, 15)), ("explicit", (1.0, 8.0), (5, 40))],
)
def test_draws_are_exact_in_every_epoch(mixing, weights, draws):
    corpus = Corpus([MixtureSource("a", rows_of(30, 6), weights[0]), MixtureSource("b", rows_of(9), weights[1])])
    order = Order(corpus.streams(mixing), seed=1, global_batch=4)
    assert order.rows_per_epoch == 45
    for epoch in range(3):
        steps = np.arange(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        rows = order.at(steps).rows_SG
        ids = corpus.take(rows[rows != PADDING])[schema.SAMPLE_ID].to_pylist()
        assert (sum(i.startswith("a/") for i in ids), sum(i.startswith("b/") for i in ids)) == draws
        if mixing == "proportional":
            assert len(set(ids)) == 45
        again = Order(corpus.streams(mixing), seed=1, global_batch=4).at(steps).rows_SG
        np.testing.assert_array_equal(rows, again)


def test_kinds_share_their_sources_draws():
    corpus = Corpus([MixtureSource("a", rows_of(30, 6), 1.0), MixtureSource("b", rows_of(36), 1.0)])
    draws = {(s.source, s.kind): s.draws for s in corpus.streams("explicit")}
    assert draws == {(0, "image"): 30, (0, "video"): 6, (1, "image"): 36}


def test_ids_are_unique_and_image_ids_are_of_the_content(tmp_path):
    """Two manifests with the same ids for the same files."""
    first, second = rows_of(3), rows_of(3)
    both = Corpus([MixtureSource("x", first), MixtureSource("y", second)]).take(np.array([5, 0, 2, 3]))
    assert both[schema.SAMPLE_ID].to_pylist() == ["y/s2", "x/s0", "x/s2", "y/s0"]
    ids = image_ids(both)
    assert ids[0] == ids[2] and ids[1] == ids[3] and ids[0] != ids[1]
    alone = Corpus([MixtureSource("x", first)])
    assert alone.take(np.array([1]))[schema.SAMPLE_ID].to_pylist() == ["s1"]
    assert len(Corpus([MixtureSource("x", first), MixtureSource("y", second)]).take(np.array([], dtype=np.int64))) == 0


def test_names_are_the_ends_of_the_paths(tmp_path):
    assert source_names(["/data/coco.parquet", "s3://b/vg"]) == ["coco.parquet", "vg"]
    assert source_names(["/a/run/manifest", "/b/run/manifest/", "/b/x"]) == ["a/run/manifest", "b/run/manifest", "b/x"]
    with pytest.raises(UserError, match="names /a/b twice"):
        source_names(["/a/b", "/a/b"])


def test_tables_and_parts_make_one_corpus(tmp_path):
    folder = tmp_path / "prepared"
    write_parts(folder / "manifest", {("image", "train"): 40, ("image", "val"): 5}, rows_per_part=16)
    rows = [{"sample_id": f"t{i}", "media": str(tmp_path / f"{i}.jpg")} for i in range(3)]
    write_table(manifest(rows), str(tmp_path / "table.parquet"))
    paths = [(str(folder), None), (str(tmp_path / "table.parquet"), None)]
    corpus = open_corpus(paths, split="train", kind=None)
    assert isinstance(corpus.sources[0].rows, PartRows) and corpus.num_rows == 43
    found = corpus.take(np.array([42, 39, 0]))[schema.SAMPLE_ID].to_pylist()
    own = [row_contents(row)[schema.SAMPLE_ID] for row in (39, 0)]
    assert found == ["table.parquet/t2", *(f"prepared/{name}" for name in own)]
    held = corpus.in_memory(lambda table: table.append_column("more", [[1] * len(table)]))
    assert set(held.take(np.arange(43))["more"].to_pylist()) == {1}
    inside = open_corpus([(str(folder / "manifest"), None)], split="train", kind=None)
    assert inside.fingerprint == open_corpus(paths[:1], split="train", kind=None).fingerprint
    assert corpus.fingerprint != open_corpus(paths[:1], split="train", kind=None).fingerprint
    with pytest.raises(UserError, match=r"2 of 2 rows have no caption"):
        write_table(manifest([{**row, "captions": []} for row in rows[:2]]), str(tmp_path / "table.parquet"))
        open_corpus(paths, split="train", kind=None)
