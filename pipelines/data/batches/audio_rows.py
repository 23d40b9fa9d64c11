"""The sound of a table's rows in Arrow columns: only the valid segments are stored."""

from collections.abc import Sequence
from typing import Any, Final, Literal, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.batches.token_codec import RAW_DTYPES, TokenDtype, decode_tokens, raw_width

WAVEFORM: Final = "waveform"
AUDIO_VALID = "audio_valid"
_VALUES, _LENGTH, _CODEC = "audio_values", "audio_length", "audio_codec"


class AudioRows:
    """Sound of a table's rows; a row is silent until it is set.

    Args:
        num_rows: Number of rows of the table.
        num_segments: Number of segments of each row.
        length: Samples of a segment, or width of a cached segment's vector.
        codec: `WAVEFORM`, or the storage type of cached vectors.
    """

    def __init__(
        self, num_rows: int, num_segments: int, length: int, codec: Literal["waveform"] | TokenDtype = WAVEFORM
    ) -> None:
        self.length, self.codec = length, codec
        self._is_valid = [[False] * num_segments for _ in range(num_rows)]
        self._values = [b""] * num_rows

    def __setitem__(self, row: int, sound: tuple[NDArray[Any], Sequence[bool]]) -> None:
        """Set the samples or raw vectors of the valid segments [valid, ...], and the mask of valid segments."""
        values, is_valid = sound
        assert values.shape == (sum(is_valid), _raw_length(self.length, self.codec)), f"row {row}: {values.shape}"
        assert values.dtype == _raw_dtype(self.codec), f"row {row}: {values.dtype} is not {self.codec}"
        self._values[row], self._is_valid[row] = values.tobytes(), list(is_valid)

    def columns(self) -> dict[str, pa.Array]:
        """Columns of the packed table."""
        count = len(self._values)
        return {
            AUDIO_VALID: pa.array(self._is_valid, pa.list_(pa.bool_())),
            _LENGTH: pa.array([self.length] * count, pa.int32()),
            _CODEC: pa.array([self.codec] * count, pa.string()),
            _VALUES: pa.array(self._values, pa.large_binary()),
        }


def unpack_audio(table: pa.Table) -> tuple[NDArray[Any], NDArray[np.bool_]] | tuple[None, None]:
    """Rebuild `SampleBatch.audio` and `audio_valid` from a packed table; None without sound."""
    if AUDIO_VALID not in table.column_names:
        return None, None
    is_valid = np.array(table[AUDIO_VALID].to_pylist(), dtype=np.bool_)
    codec, length = table[_CODEC][0].as_py(), table[_LENGTH][0].as_py()
    content = b"".join(memoryview(value.as_buffer()) for value in table[_VALUES])
    raw = np.frombuffer(content, dtype=_raw_dtype(codec)).reshape(-1, _raw_length(length, codec))
    values = raw if codec == WAVEFORM else decode_tokens(raw, codec)
    audio = np.zeros((*is_valid.shape, length), dtype=values.dtype)
    audio[is_valid] = values
    return audio, is_valid


def _raw_dtype(codec: str) -> np.dtype[Any]:
    return np.dtype(np.float32) if codec == WAVEFORM else RAW_DTYPES[codec]


def _raw_length(length: int, codec: str) -> int:
    return length if codec == WAVEFORM else raw_width(length, cast(TokenDtype, codec))
