"""What the data plane asks of a store, asked of gs://: `python -m tests.pipelines.data.gcs_files BUCKET [FOLDER]`."""

import sys

import fsspec

from pipelines.data import storage
from pipelines.data.failures import MediaError
from pipelines.data.storage.checkpoint_folders import finished_checkpoints, prune
from pipelines.data.storage.local_copies import local_folder
from pipelines.data.storage.retries import with_retries


def main(bucket: str) -> None:
    """Make a bucket and read, write, list, move and remove in it."""
    fsspec.filesystem("gs").mkdir(bucket.removeprefix("gs://"))
    odd = f"{bucket}/a folder/x y.bin"
    storage.write_bytes(odd, b"12345")
    assert storage.read_bytes(odd, 5) == b"12345" and storage.read_range(odd, 1, 2) == b"23"
    assert storage.read_range(odd, 9, 2) == b"" and storage.size_bytes(odd) == 5
    try:
        storage.read_bytes(odd, 4)
        raise AssertionError("the limit did not hold")
    except storage.FileTooLargeError:
        pass
    assert storage.exists(odd) and not storage.exists(f"{bucket}/none") and storage.is_folder(f"{bucket}/a folder")
    storage.move_file(odd, f"{bucket}/a folder/z.bin")
    assert storage.list_files(bucket) == ["a folder/z.bin"] and storage.folder_names(bucket) == ["a folder"]
    storage.remove_file(f"{bucket}/a folder/z.bin")
    large = bytes(range(256)) * 30_000  # more than gcsfs sends at a time
    storage.write_bytes(f"{bucket}/large", large)
    assert storage.read_bytes(f"{bucket}/large", 10**8) == large
    for step in (1, 2):
        for name in ("bridge.json", "complete.json"):
            storage.write_text(f"{bucket}/run/checkpoints/step-{step:08d}/{name}", "{}")
    assert prune(f"{bucket}/run", 1) == [f"{bucket}/run/checkpoints/step-00000001"]
    (newest,) = finished_checkpoints(f"{bucket}/run")
    assert (local_folder(newest) / "complete.json").read_text() == "{}"
    for media, expected in ((f"{bucket}/gone.jpg", "missing"), ("gs://no-such-bucket/a.jpg", "config")):
        try:
            with_retries(media, lambda media=media: storage.read_bytes(media, 10))
            raise AssertionError(f"{media} was read")
        except MediaError as error:
            assert error.error_class == expected, error
    print("all files as they should be")


if __name__ == "__main__":
    main(sys.argv[1])
    for folder in sys.argv[2:]:
        fsspec.filesystem("gs").put(f"{folder}/", f"{sys.argv[1]}/in/", recursive=True)
