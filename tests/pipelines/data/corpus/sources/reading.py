"""A source read as a whole."""

from pipelines.data.corpus.sources.raw import Source
from pipelines.data.corpus.sources.source import read_source


def read(path, **options):
    """(rows as dicts, failures) of a source."""
    rows, failures = [], []
    for block in read_source(Source(path=str(path), **options)):
        rows += block.rows.to_pylist()
        failures += block.failures
    return rows, failures
