"""Segments of a clip's sound: the right seconds of real files, and masks where there is none."""

import dataclasses
import json
import os
import signal

import av
import numpy as np
import pytest

from pipelines.data.failures import MediaError
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.samples import Limits, SampleDecoder
from pipelines.data.media.stage_costs import StageCosts
from pipelines.data.media.video import audio_segments, audio_track
from tests.pipelines.data.builders import DECODE, heard_seconds, jpeg, stairs, write_clip, write_sounding_clip

RATE_HZ = 16_000
SAMPLING = AudioSampling(sample_rate_hz=RATE_HZ, num_segments=4, segment_s=1.0)
SOUNDING = dataclasses.replace(DECODE, audio=SAMPLING)
FORMATS = [("aac", "mp4", 44_100), ("libopus", "mp4", 48_000), ("libopus", "mkv", 48_000), ("mp2", "mpg", 32_000)]
SAMPLE_TOLERANCE = 1e-4
"""16-bit levels are 3e-5 apart; worst measured 3.0e-5."""

RUN_UP_TOLERANCE = 0.01
"""Of a sine of 0.5; worst measured 0.0015."""


@pytest.fixture(scope="module")
def decoder():
    made = SampleDecoder(SOUNDING)
    yield made
    made.close()


def _decode(decoder, path, **part):
    return decoder.decode(kind="video", media=str(path), **part)


@pytest.mark.parametrize(("codec", "container", "rate_hz"), FORMATS)
def test_each_segment_is_of_its_second(tmp_path, decoder, codec, container, rate_hz):
    """19 s in 4 segments: one begins at each of the seconds 0, 6, 12 and 18."""
    path = tmp_path / f"a.{container}"
    write_sounding_clip(path, stairs(19, rate_hz), rate_hz=rate_hz, codec=codec)
    clip = _decode(decoder, path)
    assert clip.waveforms.shape == (4, RATE_HZ) and clip.waveforms.dtype == np.float32
    assert clip.audio_valid.tolist() == [True] * 4
    for waveform, second in zip(clip.waveforms, (0, 6, 12, 18), strict=True):
        seconds = heard_seconds(waveform, RATE_HZ)
        assert seconds[1:9] == [second] * 8
        assert np.abs(waveform[RATE_HZ // 10 : -RATE_HZ // 10]).max() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("codec", "container", "rate_hz"), FORMATS)
def test_a_part_of_the_file(tmp_path, decoder, codec, container, rate_hz):
    path = tmp_path / f"a.{container}"
    write_sounding_clip(path, stairs(19, rate_hz), rate_hz=rate_hz, codec=codec)
    clip = _decode(decoder, path, start_s=7.0, end_s=11.0)
    assert [heard_seconds(waveform, RATE_HZ)[1:9] for waveform in clip.waveforms] == [[s] * 8 for s in (7, 8, 9, 10)]
    assert clip.audio_valid.all()


def test_seeking_gives_the_very_samples_of_decoding_it_all(tmp_path, decoder):
    """Stored without loss, so that a sample in the wrong place would show."""
    samples = stairs(40, RATE_HZ)
    path = write_sounding_clip(tmp_path / "a.mkv", samples, rate_hz=RATE_HZ, codec="pcm_s16le")
    clip = _decode(decoder, path, start_s=0.35)
    for waveform, start_s in zip(clip.waveforms, SAMPLING.starts_s(0.35, 40.0), strict=True):
        begin = round(start_s * RATE_HZ)
        assert np.abs(waveform - samples[begin : begin + RATE_HZ]).max() < SAMPLE_TOLERANCE


@pytest.mark.parametrize(("codec", "container", "rate_hz"), FORMATS)
def test_seeking_equals_decoding_on(tmp_path, monkeypatch, codec, container, rate_hz):
    """Decoders that start in the middle need a run-up. Containers may count time in milliseconds, hence the shift."""
    path = tmp_path / f"a.{container}"
    write_sounding_clip(path, stairs(19, rate_hz), rate_hz=rate_hz, codec=codec)
    own = AudioSampling(sample_rate_hz=rate_hz, num_segments=4, segment_s=1.0)
    arguments = {"start_s": 0.0, "end_s": 19.0, "zero_s": 0.0}
    sought, _ = audio_segments.read_segments(str(path), own, **arguments)
    monkeypatch.setattr(audio_segments, "_MIN_SEEK_S", 1e9)
    decoded, _ = audio_segments.read_segments(str(path), own, **arguments)
    most = round(0.0015 * rate_hz)
    for one, other in zip(sought, decoded, strict=True):
        middle = other[most:-most]
        shifts = [np.abs(one[at : at + len(middle)] - middle).max() for at in range(2 * most + 1)]
        assert min(shifts) < RUN_UP_TOLERANCE


def test_an_index_that_leads_astray_is_not_followed(tmp_path, monkeypatch):
    """As of a damaged file: every seek lands far behind."""
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(19, 44_100), rate_hz=44_100)
    true_seek = audio_track.AudioTrack.seek
    monkeypatch.setattr(audio_track.AudioTrack, "seek", lambda self, to_s: true_seek(self, to_s + 4.0))
    waveforms, is_valid = audio_segments.read_segments(str(path), SAMPLING, start_s=0.0, end_s=19.0, zero_s=0.0)
    assert is_valid.all()
    assert [heard_seconds(waveform, RATE_HZ)[5] for waveform in waveforms] == [0, 6, 12, 18]


def test_sound_that_begins_late_and_ends_early(tmp_path, decoder):
    """From 7 s to 12.5 s of 19: no segment from 0, none from 18; the last half of one has ended."""
    sounds = stairs(5.5, 44_100)
    path = write_sounding_clip(tmp_path / "a.mkv", sounds, rate_hz=44_100, video_s=19, sound_from_s=7)
    clip = _decode(decoder, path)
    assert clip.audio_valid.tolist() == [False, False, True, False]
    assert not clip.waveforms[[0, 1, 3]].any()
    seconds = heard_seconds(clip.waveforms[2], RATE_HZ)  # from 12 s, which is the sound's sixth second
    assert seconds[1:4] == [5] * 3 and seconds[6:] == [None] * 4
    assert _decode(decoder, path, end_s=6.0).audio_valid.tolist() == [False] * 4


def test_a_sound_shorter_than_a_segment_is_padded_and_valid_once(tmp_path, decoder):
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(0.6, 44_100), rate_hz=44_100)
    clip = _decode(decoder, path)
    assert clip.audio_valid.tolist() == [True, False, False, False]
    assert heard_seconds(clip.waveforms[0], RATE_HZ)[1:5] == [0] * 4
    assert not clip.waveforms[0, round(0.7 * RATE_HZ) :].any() and not clip.waveforms[1:].any()
    # A part of a longer file ends as well where its clip does.
    long = write_sounding_clip(tmp_path / "b.mp4", stairs(9, 44_100), rate_hz=44_100)
    part = _decode(decoder, long, start_s=3.0, end_s=3.5)
    assert part.audio_valid.tolist() == [True, False, False, False]
    assert heard_seconds(part.waveforms[0], RATE_HZ) == [3] * 5 + [None] * 5


def test_a_clip_of_one_frame_has_its_sound(tmp_path, decoder):
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(3, 44_100), rate_hz=44_100, video_s=0.1)
    clip = _decode(decoder, path)
    assert clip.frame_valid.tolist() == [True, False, False, False]
    assert clip.audio_valid.tolist() == [True, False, False, False]
    assert clip.waveforms[0, : RATE_HZ // 10].any() and not clip.waveforms[0, RATE_HZ // 10 :].any()


def test_silence_in_a_track_is_sound(tmp_path, decoder):
    """A track that holds zeros was recorded; only where there is no track nothing was."""
    path = write_sounding_clip(tmp_path / "a.mp4", np.zeros(9 * 44_100), rate_hz=44_100)
    clip = _decode(decoder, path)
    assert clip.audio_valid.all() and not clip.waveforms.any()


def test_no_track_and_images_are_masked(tmp_path, decoder):
    mute = _decode(decoder, write_clip(tmp_path / "mute.mp4", [100] * 30))
    image = decoder.decode(kind="image", data=jpeg())
    for clip in (mute, image):
        assert clip.waveforms.shape == (4, RATE_HZ) and not clip.waveforms.any()
        assert clip.audio_valid.tolist() == [False] * 4


def test_nothing_is_decoded_that_nobody_asked_for(tmp_path):
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(3, 44_100), rate_hz=44_100)
    decoder = SampleDecoder(DECODE)
    try:
        clip = _decode(decoder, path)
    finally:
        decoder.close()
    assert clip.waveforms is None and clip.audio_valid is None


def test_pictures_are_the_same_with_sound_and_without(tmp_path, decoder):
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(3, 44_100), rate_hz=44_100)
    plain = SampleDecoder(DECODE)
    try:
        one, other = _decode(plain, path), _decode(decoder, path)
    finally:
        plain.close()
    np.testing.assert_array_equal(one.pixels, other.pixels)
    np.testing.assert_array_equal(one.frame_valid, other.frame_valid)


def test_bounds_outside_the_file_are_the_manifests_mistake(tmp_path, decoder):
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(3, 44_100), rate_hz=44_100)
    with pytest.raises(MediaError, match="leave nothing of a clip of 3.000 s") as caught:
        _decode(decoder, path, start_s=50.0, end_s=60.0)
    assert (caught.value.error_class, caught.value.stage) == ("config", "manifest")


def test_damaged_sound_is_named_and_its_pictures_do_not_pass_for_whole(tmp_path, decoder):
    path = write_sounding_clip(tmp_path / "a.mkv", stairs(9, 44_100), rate_hz=44_100, video_s=9)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(container.streams.audio[0]) if packet.size]
    for position, size in places:
        # Behind the block's header of 4 bytes.
        content[position + 4 : position + size] = b"\xff" * (size - 4)
    with pytest.raises(MediaError, match="^corrupt: the sound: .* audio packets cannot be decoded"):
        decoder.decode(kind="video", data=bytes(content))


def test_a_child_that_is_killed_over_a_sound_is_replaced(tmp_path, decoder):
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(9, 44_100), rate_hz=44_100)
    first = _decode(decoder, path)
    (pid,) = decoder.videos.child_pids()
    os.kill(pid, signal.SIGKILL)
    again = _decode(decoder, path)
    np.testing.assert_array_equal(first.waveforms, again.waveforms)
    assert decoder.videos.child_pids() != [pid]


def test_sound_counts_as_decoding(tmp_path, decoder):
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(30, 44_100), rate_hz=44_100, fps=2)
    audio = AudioSampling(sample_rate_hz=RATE_HZ, num_segments=2, segment_s=15.0)
    hearing, deaf = SampleDecoder(dataclasses.replace(DECODE, audio=audio)), SampleDecoder(DECODE)

    def least_s(one):
        costs = [StageCosts() for _ in range(4)]
        for cost in costs:
            one.decode(kind="video", media=str(path), costs=cost)
        return min(cost.decode_s for cost in costs)

    try:
        assert least_s(hearing) > 1.5 * least_s(deaf)
    finally:
        hearing.close()
        deaf.close()


def test_what_lies_between_segments_is_not_decoded(tmp_path, monkeypatch):
    path = write_sounding_clip(tmp_path / "a.mp4", stairs(60, 44_100), rate_hz=44_100, fps=2)
    true_check, counts = audio_track.AudioTrack.require_decodable, []
    monkeypatch.setattr(
        audio_track.AudioTrack, "require_decodable", lambda self: (counts.append(self._num_packets), true_check(self))
    )
    audio_segments.read_segments(str(path), SAMPLING, start_s=0.0, end_s=60.0, zero_s=0.0)
    # Four seconds and what is read before each; the whole has 2584 packets of 1024 samples.
    assert 4 * 43 <= counts[0] <= 6 * 43


@pytest.mark.slow
def test_an_hour_fits_where_its_sound_would_not(tmp_path):
    path = write_sounding_clip(tmp_path / "a.mp4", np.tile(stairs(30, 8000), 120), rate_hz=8000, fps=1)
    audio = AudioSampling(sample_rate_hz=48_000)
    limits = Limits(video_timeout_s=10, video_memory_bytes=2**29)  # of sound alone it would be 690 MB
    decoder = SampleDecoder(dataclasses.replace(DECODE, audio=audio, limits=limits))
    try:
        clip = decoder.decode(kind="video", media=str(path))
    finally:
        decoder.close()
    assert clip.audio_valid.all()
    begun_s = audio.starts_s(0.0, 3600.0)
    assert [heard_seconds(one, 48_000)[5] for one in clip.waveforms] == [int(start_s + 0.5) % 30 for start_s in begun_s]


def test_real_soundtracks(test_data_dir, decoder):
    """Every clip that shows frames has valid segments where its truth says that it has sound, none where not."""
    records = json.loads((test_data_dir / "MANIFEST.json").read_text())["records"]
    shown = [r for r in records if r["kind"] == "video" and r["ground_truth"]["expected"].startswith("decodes")]
    wrong = {}
    for record in shown:
        clip = _decode(decoder, test_data_dir / record["path"])
        if clip.audio_valid.any() != record["ground_truth"]["has_audio"]:
            wrong[record["path"]] = clip.audio_valid.tolist()
    assert wrong == {} and sum(record["ground_truth"]["has_audio"] for record in shown) > 10
