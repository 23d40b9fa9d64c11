"""A fault in an image plugin: pictures of one size kill the process that decodes them, as damaged files can."""

import os
import runpy
import sys
from pathlib import Path

from pipelines.data.media.samples import DecodeSettings

CRASHING_SIZE = (13, 13)
_PLUGIN = f"""
import ctypes
from PIL import PngImagePlugin

before = PngImagePlugin.PngImageFile.load_prepare

def load_prepare(self):
    if self.size == {CRASHING_SIZE}:
        ctypes.string_at(0)  # not os.kill: any thread may take its signal, while this one decodes on
    before(self)

PngImagePlugin.PngImageFile.load_prepare = load_prepare
"""


def write_plugin(folder: Path) -> str:
    """Write the fault, as what Python runs when it starts with `folder` in PYTHONPATH."""
    (folder / "sitecustomize.py").write_text(_PLUGIN)
    return str(folder)


class CrashingSettings(DecodeSettings):
    """Settings that bring the fault into the process which unpickles them, and into its children."""

    __slots__ = ("folder",)

    def __reduce__(self):
        return _install, (DecodeSettings(preprocessing=self.preprocessing, num_frames=self.num_frames), self.folder)


def crashing_settings(settings: DecodeSettings, folder: str) -> CrashingSettings:
    """Those settings with the fault of `write_plugin`'s folder."""
    made = CrashingSettings(preprocessing=settings.preprocessing, num_frames=settings.num_frames)
    object.__setattr__(made, "folder", folder)
    return made


def _install(settings: DecodeSettings, folder: str) -> CrashingSettings:
    if os.environ.get("QFORMER_DRIVER") != str(os.getpid()):
        runpy.run_path(os.path.join(folder, "sitecustomize.py"))
        sys.path.insert(0, folder)  # the children's PYTHONPATH
    return crashing_settings(settings, folder)  # it may travel on
