"""The four ways give what they gave before all bridges had one seam: outputs, losses, gradients, names of weights.

The comparison runs in a process that takes the choice of CPU kernels away from the machine (`record.FIXED_CPU`). Where
plain torch operations round there as they did on the recording machine (`record.fingerprint`), everything is equal bit
for bit; elsewhere within `CLOSE`, and digests of bytes are not compared.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.qformer.bridges.record import FIXED_CPU, KINDS

RECORDED = Path(__file__).with_name("recorded.safetensors")
CLOSE = {"atol": 1e-6, "rtol": 1e-5}
"""For machines that round otherwise; relative to gradients up to 1e2."""


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    file = tmp_path_factory.mktemp("record") / "now.safetensors"
    script = Path(__file__).with_name("record.py")
    environment = {**os.environ, **FIXED_CPU, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, str(script), str(file)], env=environment, check=True, timeout=600)
    return load_file(file), load_file(RECORDED)


@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bridge_gives_what_it_gave(tensors, kind, stage):
    now, before = ({k: v for k, v in own.items() if k.startswith(f"{kind}.{stage}.")} for own in tensors)
    assert now.keys() == before.keys() and len(before) > 20
    is_same_machine = tensors[0]["fingerprint"].equal(tensors[1]["fingerprint"])
    for name, expected in before.items():
        if is_same_machine or not expected.is_floating_point() and not name.endswith(".bytes"):
            assert now[name].equal(expected), name
        elif expected.is_floating_point():
            torch.testing.assert_close(now[name], expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_the_record_covers_what_it_says(tensors):
    """Every way in both stages: one frame and clips with padding, gradient caching, text, sound."""
    cases = {
        "1": ("checkpoint", "image", "clip", "cached"),
        "2": ("image", "clip", "text", "sound"),
    }
    names = {tuple(name.split(".")[:3]) for name in tensors[1] if name != "fingerprint"}
    expected = {(kind, stage, case) for kind in KINDS for stage, own in cases.items() for case in own}
    assert expected <= names and names - expected == {("cascaded", "1", "frozen"), ("cascaded", "2", "joint")}
