"""Sound: a tone whose place and pitch tell the clip bounds."""

import json

import av
import numpy as np
import pytest

from pipelines.data.failures import MediaError
from pipelines.data.media.clip import WaveformRequest
from pipelines.data.media.samples import SampleDecoder
from pipelines.data.media.video.pool import VideoPool
from pipelines.data.media.video.waveform import read_waveform
from tests.pipelines.data.builders import DECODE, write_clip

RATE_HZ = 16_000
MAX_PIXELS = 10**7
SAMPLE_TOLERANCE = 1e-4
"""16-bit levels are 3e-5 apart; worst measured 3.0e-5."""


def _write(path, *, tone_from_s=1.0, length_s=3.0, rate_hz=44_100, video_offset_s=0.0):
    """Three seconds of video; stereo sound that is silent until `tone_from_s`, then 440 Hz at half loudness."""
    times_s = np.arange(int(length_s * rate_hz)) / rate_hz
    tone = np.where(times_s >= tone_from_s, 0.5 * np.sin(2 * np.pi * 440 * times_s), 0.0).astype(np.float32)
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=10), container.add_stream("aac", rate=rate_hz)
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        sound.layout = "stereo"
        for index in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, dtype=np.uint8), format="rgb24")
            frame.pts = index + round(10 * video_offset_s)
            container.mux(pictures.encode(frame))
        for start in range(0, len(tone) - 1023, 1024):
            piece = np.ascontiguousarray(np.stack([tone[start : start + 1024]] * 2))
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate_hz, start
            container.mux(sound.encode(frame))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    return str(path)


def _read(path, **part):
    return read_waveform(path, WaveformRequest(sample_rate_hz=RATE_HZ, **part), MAX_PIXELS)


def _onset_s(samples) -> float:
    return float(np.flatnonzero(np.abs(samples) > 0.25)[0] / RATE_HZ)


def test_mono_at_the_wanted_rate(tmp_path):
    samples = _read(_write(tmp_path / "a.mp4"))
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert len(samples) / RATE_HZ == pytest.approx(3.0, abs=0.05)
    assert _onset_s(samples) == pytest.approx(1.0, abs=0.03)
    tone = samples[int(1.5 * RATE_HZ) : int(2.5 * RATE_HZ)]
    assert np.abs(np.fft.rfft(tone)).argmax() == 440
    assert np.abs(tone).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("start_s", [0.5, 0.9])
def test_a_part(tmp_path, start_s):
    samples = _read(_write(tmp_path / "a.mp4"), start_s=start_s, end_s=2.0)
    assert len(samples) == round((2.0 - start_s) * RATE_HZ)
    assert _onset_s(samples) == pytest.approx(1.0 - start_s, abs=0.03)


def test_zero_is_the_first_video_frame(tmp_path):
    """The pictures begin half a second after the sound, so in clip time the tone begins sooner."""
    samples = _read(_write(tmp_path / "a.mkv", video_offset_s=0.5))
    assert _onset_s(samples) == pytest.approx(0.5, abs=0.05)


def test_no_sound_is_none(tmp_path):
    assert _read(str(write_clip(tmp_path / "mute.mp4", [100] * 3))) is None


def test_an_empty_part_is_refused(tmp_path):
    with pytest.raises(MediaError, match="leave no sound"):
        _read(_write(tmp_path / "a.mp4"), start_s=2.0, end_s=1.0)


def test_a_part_behind_the_end_is_empty(tmp_path):
    assert len(_read(_write(tmp_path / "a.mp4"), start_s=50.0, end_s=51.0)) == 0


def _write_exact(path):
    """A second of silence and two of a sine at 440 Hz, stored without loss, the right channel half as loud."""
    times_s = np.arange(3 * RATE_HZ) / RATE_HZ
    tone = np.where(times_s >= 1.0, 0.8 * np.sin(2 * np.pi * 440 * times_s), 0.0)
    levels = np.rint(np.stack([tone, tone / 2], axis=1) * 32767).astype(np.int16)
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=RATE_HZ)
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        sound.layout = "stereo"
        for index in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, dtype=np.uint8), format="rgb24")
            frame.pts = index
            container.mux(pictures.encode(frame))
        for start in range(0, len(levels), 1600):
            frame = av.AudioFrame.from_ndarray(
                levels[start : start + 1600].reshape(1, -1), format="s16", layout="stereo"
            )
            frame.sample_rate, frame.pts = RATE_HZ, start
            container.mux(sound.encode(frame))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    return np.asarray(tone * 0.75, dtype=np.float32)


def test_a_decoder_gives_the_samples_of_a_known_sine(tmp_path):
    """What a model of sound and pictures would ask, by path and by content; mono is the mean of the channels."""
    truth = _write_exact(tmp_path / "a.mkv")
    content = (tmp_path / "a.mkv").read_bytes()
    decoder = SampleDecoder(DECODE)
    try:
        for source in ({"media": str(tmp_path / "a.mkv")}, {"data": content}):
            samples = decoder.waveform(sample_rate_hz=RATE_HZ, **source)
            assert samples.dtype == np.float32 and len(samples) == len(truth)
            assert np.abs(samples - truth).max() < SAMPLE_TOLERANCE
            part = decoder.waveform(sample_rate_hz=RATE_HZ, start_s=0.9, end_s=1.4, **source)
            assert np.abs(part - truth[round(0.9 * RATE_HZ) : round(1.4 * RATE_HZ)]).max() < SAMPLE_TOLERANCE
        assert decoder.waveform(sample_rate_hz=RATE_HZ, media=str(write_clip(tmp_path / "m.mp4", [9] * 3))) is None
        for media, expected in ((tmp_path / "gone.mp4", "missing"), (tmp_path, "unsupported")):
            with pytest.raises(MediaError) as caught:
                decoder.waveform(sample_rate_hz=RATE_HZ, media=str(media))
            assert caught.value.error_class == expected
    finally:
        decoder.close()


def test_real_soundtracks(test_data_dir):
    """Every clip gives sound where its truth says so, None where not; some are damaged on purpose."""
    records = json.loads((test_data_dir / "MANIFEST.json").read_text())["records"]
    healthy = [one for one in records if one["kind"] == "video" and one["ground_truth"]["expected"] == "decodes"]
    pool, wrong = VideoPool(timeout_s=30, memory_bytes=4 * 1024**3), {}
    try:
        for record in healthy:
            path = str(test_data_dir / record["path"])
            try:
                samples = pool.read_waveform(WaveformRequest(sample_rate_hz=RATE_HZ), max_pixels=MAX_PIXELS, path=path)
            except MediaError as error:
                samples = error
            if isinstance(samples, MediaError) or (samples is None) == record["ground_truth"]["has_audio"]:
                wrong[record["path"]] = samples
    finally:
        pool.close()
    assert set(wrong) <= {"videos/moviepy__video_with_failing_audio.mp4"}, wrong
