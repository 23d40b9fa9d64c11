"""Media files in, accounted batches of pixels out: the map of this package.

Rooms, lowest first; each imports from those before it only (a test holds this order).

- `schema`: the name and type of every column. `names`: spelling suggestions. `failures`: why a sample cannot be used.
- `storage/`: files on disks and object stores, retries, members of tar shards, checkpoint folders.
- `media/`: bytes to clips of pixels and sound; `media/video/` decodes in child processes that may be killed.
- `corpus/`: sources to a manifest of usable rows and a quarantine table; `corpus/sources/` has one file a format.
- `order/`: which row is trained at which step, as a pure function of manifest, mixture, seed and step.
- `batches/`: planned rows to Arrow tables to `SampleBatch`.
- `features/`: the cache of what the frozen encoders make of a manifest.
- `dataset.py`: Ray Data runs all of this; no other module here imports ray.

A new column goes into `schema`, a new source format into `corpus/sources/`, a new file system into `storage/`, a new
decoder into `media/video/backends`, another mixture into `order/mixture`.
"""
