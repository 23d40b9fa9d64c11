"""The benchmark of the ways to join frames, at toy size: what it tells, and that its bars are figures of it."""

from multiprocessing import Pipe
from threading import Thread

from jobs.bench import video
from jobs.bench.video import FROZEN, WAYS, VideoCase, VideoTimes, measure
from qformer.config import QFormerConfig

CONFIG = QFormerConfig(encoder_width=24, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48)
CASE = VideoCase(config=CONFIG, image_tokens=7, rounds={2: 1, 3: 2, 4: 1})


def test_every_way_is_told_at_every_length_and_the_lengths_take_turns(monkeypatch):
    """In threads: a child for each would take longer than all of them."""
    turns, operations = [], {}

    class Child:
        """What the parent holds of one."""

        def __init__(self, name, frames):
            self.place, (self.pipe, theirs) = (name, frames), Pipe()
            Thread(target=video._take_turns, args=(theirs, CASE, name, frames), daemon=True).start()

        def send(self, goes_on):
            if goes_on:
                turns.append(self.place)
            self.pipe.send(goes_on)

        def recv(self):
            told = self.pipe.recv()
            if told is not None:
                operations[self.place] = told.operations
            return told

    def in_threads(case, name):
        return video._run_turns({frames: Child(name, frames) for frames in case.rounds}, case)

    monkeypatch.setattr(video, "_in_turns", in_threads)
    monkeypatch.setattr(video, "resident_bytes", {"VmRSS": 1, "VmHWM": 2}.get)
    monkeypatch.setattr(video.torch, "set_num_threads", lambda _: None)
    result = measure(CASE)
    assert turns == [(name, frames) for name in WAYS for frames in (2, 3, 4, 3)]
    places = {f"{name} {frames} frames" for name in WAYS for frames in CASE.rounds}
    assert result.seconds.keys() == {f"{place} {kind}" for place in places for kind in ("forward", "step")}
    assert {f"{place} peak GiB" for place in places} <= result.rates.keys()
    assert result.rates["mean 4 frames step clips/s"] == 1 / result.seconds["mean 4 frames step"]
    assert operations["cascaded", 4] == operations[FROZEN, 4] > operations["mean", 4] > 0


def test_the_bars_are_the_worst_of_their_kind():
    def one(forward, step):
        return VideoTimes({"forward": forward, "step": step}, 1, forward)

    found = {(name, frames): one(1.0, 3.0) for name in WAYS for frames in (8, 16, 64)}
    found |= {("cascaded", 16): one(10.0, 30.0), ("cascaded", 64): one(40.0, 129.0), (FROZEN, 16): one(10.0, 11.0)}
    found |= {("spatio_temporal", 16): one(2.0, 5.5), ("spatio_temporal", 64): one(6.0, 11.0)}
    assert video._ratios(VideoCase(), found) == {
        "growth_16_to_64": 4.3,
        "st_vs_cascaded": 0.2,
        "st_vs_cascaded_frozen": 0.5,
        "st_vs_cascaded_operations": 0.2,
    }
