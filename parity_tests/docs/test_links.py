"""Links and tables of the README and the pages. `make check` runs this file, too, and builds the site strictly."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ettin.bench.report import filled

ROOT = Path(__file__).parents[2]
# Read in the repository; the pages in docs/ are checked by MkDocs, and the test of remote files builds them.
REPOSITORY_PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "bench/results/README.md", "deploy/README.md"),
    *("artifacts/FORMAT.md", "bench/pretend_cpu/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.md")),
]
ALL_PAGES = [*REPOSITORY_PAGES, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_REMOTE = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?(?:https?:)?//""")


def text_of(page: str | Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings)
    return {heading.strip().lower().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_external_links_are_written_right(page: str) -> None:
    """Their syntax alone: no test needs a network."""
    for link in (link for link in _LINK.findall(text_of(page)) if "://" in link):
        parts = urlsplit(link)
        assert parts.scheme == "https" and re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), f"{page}: {link}"


@pytest.mark.parametrize("page", REPOSITORY_PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in (link for link in _LINK.findall(text_of(page)) if "://" not in link):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{page}: {link}"


def test_site_builds_strictly_and_loads_nothing_from_other_servers(tmp_path: Path) -> None:
    """The pages work on a machine without a network, and all links between them lead somewhere."""
    # Not --quiet: MkDocs then counts no warning, so --strict would let every one of them pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        assert not _REMOTE.search(page.read_text(encoding="utf-8")), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if "<!-- table:" in (ROOT / page).read_text("utf-8")])
def test_tables_are_what_the_results_say(page: str) -> None:
    file = ROOT / page
    text = file.read_text(encoding="utf-8")
    assert filled(text, file.parent) == text, f"run: ettin-bench report {page}"


def test_rows_of_the_readme_are_rows_of_the_benchmarks() -> None:
    """The README shows some rows of a table that is made from results, and changes nothing in them."""
    measured = re.search(r"^## Speed\n.*?(?=^## )", text_of("README.md"), re.MULTILINE | re.DOTALL)
    assert measured
    rows = [line for line in measured[0].splitlines() if line.startswith("|")]
    made = text_of("docs/benchmarks.md").splitlines()
    assert len(rows) == 7 and all(row in made for row in rows), [row for row in rows if row not in made]
