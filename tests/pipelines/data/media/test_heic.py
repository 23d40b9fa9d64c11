"""HEIC where the package for it is installed: here in a folder of its own, beside ours for one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[4]
DECODE = """
import io
import pillow_heif
from PIL import Image
from pipelines.data.media.images import decode_image, image_facts
from pipelines.data.failures import MediaError
from pipelines.data.media.kinds import sniff_kind

picture = Image.new("RGB", (64, 48), (200, 30, 30))
picture.paste((30, 30, 200), (0, 0, 32, 48))
written, exif = io.BytesIO(), picture.getexif()
exif[0x0112] = 6  # shown a quarter turned, clockwise: the left half comes to lie on top
pillow_heif.register_heif_opener()
picture.save(written, "HEIF", exif=exif.tobytes())
data = written.getvalue()
shown = decode_image(data, 10**6)
top, bottom = shown.getpixel((24, 10)), shown.getpixel((24, 54))
print(sniff_kind(data[:192]), image_facts(data, 10**6).codec, shown.size, top[2] > 150 > top[0], bottom[0] > 150)
try:
    decode_image(data[:300], 10**6)
except MediaError as error:
    print(error.error_class)
"""


def test_a_turned_picture_is_decoded_and_a_cut_one_is_corrupt(tmp_path):
    packages = os.environ.get("QFORMER_TEST_HEIC") or str(tmp_path / "packages")
    if "QFORMER_TEST_HEIC" not in os.environ:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, "pillow-heif"]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pillow-heif cannot be installed, and QFORMER_TEST_HEIC names no folder: {done.stderr[-200:]}")
    path = os.pathsep.join([str(REPOSITORY), *(one for one in sys.path if one.endswith("site-packages")), packages])
    done = subprocess.run(
        [sys.executable, "-c", DECODE],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["image heif (48, 64) True True", "corrupt"], done.stderr[-2000:]
