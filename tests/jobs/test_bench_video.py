"""The benchmark of the ways to join frames, at toy size: what it tells, and that its bars are figures of it."""

import dataclasses

from jobs.bench import video
from jobs.bench.video import FROZEN, WAYS, Case, Measured, measure
from qformer.config import QFormerConfig

CONFIG = QFormerConfig(encoder_width=24, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48)
CASE = Case(config=CONFIG, image_tokens=7, rounds={2: 1, 3: 2, 4: 1})


def test_every_way_is_told_at_every_length(monkeypatch):
    """In this process: a child for each would take longer than all of them."""
    received = []

    class Sender:
        def send(self, found):
            received.append(found)

    def here(case, name, frames):
        video._report(Sender(), case, name, frames)
        return dataclasses.replace(received[-1], peak_bytes=1)  # one process has but one peak

    monkeypatch.setattr(video, "_in_child", here)
    monkeypatch.setattr(video.torch, "set_num_threads", lambda _: None)
    result = measure(CASE)
    places = {f"{name} {frames} frames" for name in WAYS for frames in CASE.rounds}
    assert result.seconds.keys() == {f"{place} {kind}" for place in places for kind in ("forward", "step")}
    assert {f"{place} peak GiB" for place in places} <= result.rates.keys()
    assert result.rates["mean 4 frames step clips/s"] == 1 / result.seconds["mean 4 frames step"]
    operations = {name: found.operations for name, found in zip([*WAYS] * 3, received, strict=True)}
    assert operations["cascaded"] == operations[FROZEN] > operations["mean"] > 0


def test_the_bars_are_the_worst_of_their_kind():
    def one(forward, step):
        return Measured({"forward": forward, "step": step}, 1, forward)

    found = {(name, frames): one(1.0, 3.0) for name in WAYS for frames in (8, 16, 64)}
    found |= {("cascaded", 16): one(10.0, 30.0), ("cascaded", 64): one(40.0, 129.0), (FROZEN, 16): one(10.0, 11.0)}
    found |= {("spatio_temporal", 16): one(2.0, 5.5), ("spatio_temporal", 64): one(6.0, 11.0)}
    assert video._ratios(Case(), found) == {
        "growth_16_to_64": 4.3,
        "st_vs_cascaded": 0.5,
        "st_vs_cascaded_operations": 0.2,
    }
