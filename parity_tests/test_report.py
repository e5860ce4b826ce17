"""`ettin-bench report`: one page of the committed results."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from ettin.artifacts.errors import InputError
from ettin.bench.cli import command
from ettin.bench.report import page, read_results, write_pictures

RESULTS = Path(__file__).parents[1] / "bench" / "results"


@pytest.fixture(scope="module")
def html() -> str:
    return page(read_results([RESULTS]))


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order."""

    VOID = ("meta", "path", "use", "br", "img", "line", "rect", "image", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID and tag != "option":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and tag != "option":
            assert self.open.pop() == tag, self.getpos()


def test_page_is_whole_and_needs_nothing_else(html: str) -> None:
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    assert not re.search(r'(?:src|href)="(?!#)', re.sub(r"xlink:href", "", html))
    assert "url(http" not in html and len(html) < 5_000_000


def test_page_has_every_result(html: str) -> None:
    for file in RESULTS.glob("*.json"):
        assert file.name in html and json.loads(file.read_text())["machine"]["cpu"] in html
    for title in ("Throughput and quality", "Ranking quality", "Where the time goes"):
        assert f"<h2>{title}</h2>" in html


def test_ids_are_its_own(html: str) -> None:
    """Pictures of one page share a name space: a clip path of one must not be another's."""
    ids = re.findall(r'<clipPath id="([^"]+)"', html)
    assert ids and len(ids) == len(set(ids))


def test_same_results_same_page(html: str) -> None:
    assert page(read_results([RESULTS])) == html


def test_text_of_results_is_no_markup(tmp_path: Path) -> None:
    record = json.loads(next(RESULTS.glob("*-cpu-17m-lexical-squad.json")).read_text())
    record["command"] = "<script>alert(1)</script>"
    (tmp_path / "one.json").write_text(json.dumps(record))
    assert "<script>alert" not in page(read_results([tmp_path]))


def test_pictures(tmp_path: Path) -> None:
    written = write_pictures(read_results([RESULTS]), tmp_path / "pictures")
    assert len(written) == len(set(written)) > 3 and all(file.read_text().startswith("<svg") for file in written)


def test_command(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    done = CliRunner().invoke(command, ["report", str(RESULTS), "--output", str(output)])
    assert (
        done.exit_code == 0 and done.stdout.strip() == str(output) and output.read_text().startswith("<!doctype html>")
    )


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results of ettin-bench"):
        read_results([tmp_path])
    (tmp_path / "some.json").write_text("{}")
    with pytest.raises(InputError, match="some.json: not a result of ettin-bench"):
        read_results([tmp_path])
