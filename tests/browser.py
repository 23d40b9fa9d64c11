"""A real Chromium for tests of pages, and where their pictures go."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# A page on loopback needs nobody: no look-ups, no updates, no accounts.
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 320, "height": 640}
DESKTOP = {"width": 1280, "height": 800}


@contextlib.contextmanager
def chromium() -> Iterator[object]:
    """A headless browser: QFORMER_TEST_CHROMIUM, or the one on the path; skips where there is none."""
    program = os.environ.get("QFORMER_TEST_CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on the path, and QFORMER_TEST_CHROMIUM names none")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def picture_folder(fallback: Path) -> Path:
    """Where screenshots go: QFORMER_TEST_SCREENSHOTS, or the test's own folder."""
    folder = Path(os.environ.get("QFORMER_TEST_SCREENSHOTS") or fallback)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
