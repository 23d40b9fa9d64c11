"""The pages as a whole: length, links, generated parts, and a site that needs no network."""

import os
import re
import runpy
import subprocess
import sys

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.docs.blocks import pages

DOCS = REPOSITORY / "docs"
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(https?:)?//([^\"' >]+)")
IMPORTED = re.compile(r"(?:@import\s+(?:url\()?|url\()[\"']?https?://")


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_the_generated_pages_are_up_to_date(capsys):
    generate = runpy.run_path(str(DOCS / "generate.py"))
    assert generate["main"](["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_told(tmp_path, capsys):
    generate = runpy.run_path(str(DOCS / "generate.py"))
    main = generate["main"]
    main.__globals__["DOCS"] = tmp_path
    assert main(["--check"]) == 1 and "docs/settings.md is out of date" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([]) == 0 == main(["--check"])


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    """Also those of README and CONTRIBUTING, which the site does not hold."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", path):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}: the anchors are {sorted(anchors(file))}"


def anchors(file):
    """The names of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(file.read_text()), flags=re.MULTILINE)
    own = [re.search(r"\{ #([\w-]+) \}", heading) for heading in headings]
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {match[1] if match else re.sub(r"[-\s]+", "-", text) for match, text in zip(own, plain, strict=True)}


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_every_page_is_in_the_navigation():
    entries = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    listed = {page for entry in entries for value in entry.values() for page in files_of(value)}
    assert listed == {page.name for page in DOCS.glob("*.md")}


def files_of(value):
    return [value] if isinstance(value, str) else [page for entry in value for page in entry.values()]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    # Material announces its successor at every build; that is no warning about these pages.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    html = list(tmp_path.rglob("*.html"))
    assert len(html) > len(list(DOCS.glob("*.md")))
    for file in html:
        fetched = [match[0] for match in FETCHED.finditer(file.read_text())]
        assert not [tag for tag in fetched if 'rel="canonical"' not in tag], file
    for file in tmp_path.rglob("*.css"):
        assert not IMPORTED.search(file.read_text()), file
    api = (tmp_path / "api" / "index.html").read_text()
    assert "open_captioner" in api and "whole_checkpoint" not in re.sub(r"<pre.*?</pre>", "", api, flags=re.DOTALL)
