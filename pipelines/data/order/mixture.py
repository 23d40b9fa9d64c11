"""Several manifests as one corpus: how many rows of each an epoch takes, and their sample ids."""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data import schema, storage
from pipelines.data.corpus.manifest import read_manifest
from pipelines.data.corpus.manifest_files import INDEX_FILE, MANIFEST_FOLDER
from pipelines.data.order.global_batches import SampleStream
from pipelines.data.order.row_index import ManifestRows, PartRows, TableRows, count_rows, stream_rows
from qformer.errors import UserError

Mixing = Literal["proportional", "sqrt", "explicit"]


@dataclass(frozen=True, slots=True)
class MixtureSource:
    """One manifest of a mixture."""

    name: str
    """Prefix of its sample ids where there are several sources, so that no two rows share an id."""
    rows: ManifestRows
    weight: float | None = None
    """Relative share of an epoch, for the mixture "explicit"."""


class Corpus:
    """Sources with consecutively numbered rows: all of the first source, then all of the second.

    Args:
        sources: One source or more.
    """

    def __init__(self, sources: Sequence[MixtureSource]) -> None:
        self.sources = tuple(sources)
        self._ends = np.cumsum([count_rows(source.rows) for source in self.sources])

    @property
    def num_rows(self) -> int:
        """Number of rows of all sources."""
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides which row a number means."""
        parts = [(source.name, source.rows.fingerprint) for source in self.sources]
        return hashlib.sha256(repr(parts if len(parts) > 1 else parts[0][1]).encode()).hexdigest()

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Rows by number, in the given order."""
        if len(self.sources) == 1:
            return self.sources[0].rows.take(rows)
        codes = np.searchsorted(self._ends, rows, side="right")
        pieces, places = [], []
        # At least one piece, also when no row is requested.
        for code in np.unique(codes) if len(codes) else [0]:
            source, chosen = self.sources[code], np.flatnonzero(codes == code)
            first = int(self._ends[code]) - count_rows(source.rows)
            pieces.append(_prefixed(source.rows.take(rows[chosen] - first), source.name))
            places.append(chosen)
        back = np.empty(len(rows), dtype=np.int64)
        back[np.concatenate(places)] = np.arange(len(rows))
        return pa.concat_tables(pieces, promote_options="default").take(pa.array(back))

    def in_memory(self, change: Callable[[pa.Table], pa.Table]) -> "Corpus":
        """Read all sources into memory and apply `change` to each table; it must keep the rows' order."""
        tables = [pa.concat_tables(stream_rows(source.rows)) for source in self.sources]
        pairs = zip(self.sources, tables, strict=True)
        return Corpus([MixtureSource(source.name, TableRows(change(table)), source.weight) for source, table in pairs])

    def streams(self, mixing: Mixing) -> tuple[SampleStream, ...]:
        """The streams for `global_batches.Order`.

        Args:
            mixing: Mixture as in `epoch_draws`.

        Raises:
            UserError: If weights and mixture contradict each other.
        """
        sizes = [count_rows(source.rows) for source in self.sources]
        draws = epoch_draws(sizes, mixing, [source.weight for source in self.sources])
        streams = []
        for place, source in enumerate(self.sources):
            first = int(self._ends[place]) - sizes[place]
            shares = _split_draws(draws[place], list(source.rows.counts.values()))
            for (kind, count), share in zip(source.rows.counts.items(), shares, strict=True):
                streams.append(
                    SampleStream(source=place, kind=kind, first_row=first, num_rows=count, draws=share),
                )
                first += count
        return tuple(streams)


def open_corpus(
    manifests: Sequence[tuple[str, float | None]],
    *,
    split: str,
    kind: str | None,
) -> Corpus:
    """Open the manifests of a training run; those in parts are not read into memory.

    Args:
        manifests: Path and weight of each.
        split: Split to train on.
        kind: Kind of rows to take, "image" or "video"; None takes both.

    Raises:
        UserError: If one cannot be read, has no rows to train on, or is listed twice.
    """
    names = source_names([path for path, _ in manifests])
    pairs = zip(names, manifests, strict=True)
    return Corpus([MixtureSource(name, _opened(path, split, kind), weight) for name, (path, weight) in pairs])


def _opened(path: str, split: str, kind: str | None) -> ManifestRows:
    if storage.is_folder(path):
        for folder in (storage.join(path, MANIFEST_FOLDER), path):
            if storage.exists(storage.join(folder, INDEX_FILE)):
                return PartRows(folder, split, kind)
    return TableRows(read_manifest(path, split, needs_captions=True, kind=kind))


def epoch_draws(sizes: Sequence[int], mixing: Mixing, weights: Sequence[float | None]) -> list[int]:
    """Number of rows that each source gives to an epoch.

    An epoch has as many rows as all sources together. "proportional": every row of every source, once. "sqrt": in
    proportion to the square root of the source's rows. "explicit": in proportion to its weight.

    Args:
        sizes: Number of rows of each source.
        mixing: One of the three mixtures.
        weights: Weight of each source, required by "explicit" and forbidden otherwise.

    Returns:
        round(total x share) of each source, at least one.

    Raises:
        UserError: If weights are missing, or given where they have no effect.
    """
    if mixing == "explicit" and None in weights:
        raise UserError("data.mixture=explicit needs a weight for every entry of data.manifest; add weight: 1 to each")
    if mixing != "explicit" and any(weight is not None for weight in weights):
        raise UserError(f"data.mixture={mixing} makes its own weights; set data.mixture=explicit, or drop the weights")
    if mixing == "proportional":
        return list(sizes)
    shares = [math.sqrt(size) for size in sizes] if mixing == "sqrt" else [weight or 0.0 for weight in weights]
    return [max(1, round(sum(sizes) * share / sum(shares))) for share in shares]


def source_names(paths: Sequence[str]) -> list[str]:
    """Short names of manifests: as many last parts of their paths as make them unique.

    Raises:
        UserError: If a manifest is listed twice.
    """
    parts = [storage.local_path(path) if storage.is_local(path) else path.rstrip("/") for path in paths]
    split = [[piece for piece in path.split("/") if piece] for path in parts]
    if len(set(parts)) < len(parts):
        twice = next(path for path in parts if parts.count(path) > 1)
        raise UserError(f"data.manifest names {twice} twice; name it once, and give it a larger weight to count more")
    for depth in itertools.count(1):
        names = ["/".join(pieces[-depth:]) for pieces in split]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("unreachable: different paths differ somewhere")


def _split_draws(draws: int, counts: Sequence[int]) -> list[int]:
    """Split a source's draws over its kinds in proportion to their rows, at least one each."""
    ends = [round(draws * end / sum(counts)) for end in itertools.accumulate(counts)]
    return [max(1, end - start) for start, end in itertools.pairwise([0, *ends])]


def _prefixed(table: pa.Table, name: str) -> pa.Table:
    ids = pc.binary_join_element_wise(pa.scalar(name), table[schema.SAMPLE_ID], "/")
    return table.set_column(table.schema.get_field_index(schema.SAMPLE_ID), schema.SAMPLE_ID, ids)
