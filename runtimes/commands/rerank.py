"""`ettin-rerank`: ranks lines or JSON objects for a query."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import click

from ettin.artifacts.errors import InputError
from ettin.runtimes.commands import console
from ettin.runtimes.loading import load


@click.command(
    epilog=console.example_epilog(
        "ettin-rerank ettin-reranker-demo/openvino-int8 --query 'red planet' passages.txt",
        "cat passages.jsonl | ettin-rerank ettin-reranker-demo/openvino-int8 --query 'red planet' --json -",
    )
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True), default="-")
@click.option("--query", required=True, help="What the documents are ranked for.")
@click.option("--top-k", type=click.IntRange(0), help="Results shown.  [default: all]")
@click.option("--field", default="text", show_default=True, help="Key of the document's text in JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON lines instead of a table.")
@click.option("--max-length", type=click.IntRange(3), help="Tokens that pairs are truncated to.")
@click.option("--device", help="cpu or cuda.  [default: what the artifact is for]")
@click.option("--key", type=click.Path(path_type=Path), help=console.KEY_HELP)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all]")
def command(
    artifact: Path, file: Path, query: str, top_k: int | None, field: str, as_json: bool, max_length: int | None,
    device: str | None, key: Path | None, threads: int | None,
) -> None:  # fmt: skip
    """Rank the documents in FILE (- or nothing: standard input) for a query, best first.

    Documents are lines of text, or JSON lines if the first line is a JSON object; its other keys are kept in --json
    output. Blank lines are skipped.
    """
    rows = list(_read(file, field))
    with load(artifact, device=device, threads=threads, max_length=max_length, trusted_key=key) as runtime:
        hits = runtime.rank(query, [row[field] for row in rows], top_k=top_k, show_progress_bar=len(rows) > 500)
    if as_json:
        for place, hit in enumerate(hits, 1):
            row = {"rank": place, "score": hit["score"], "line": rows[hit["corpus_id"]]["line"]}
            click.echo(json.dumps({**rows[hit["corpus_id"]], **row}, ensure_ascii=False))
        return
    lines = [
        [str(place), f"{hit['score']:.3f}", str(rows[hit["corpus_id"]]["line"]), rows[hit["corpus_id"]][field]]
        for place, hit in enumerate(hits, 1)
    ]
    console.table(lines, ["rank", "score", "line", "text"])


def _read(file: Path, field: str) -> Iterator[dict[str, Any]]:
    name = "standard input" if str(file) == "-" else str(file)
    try:
        with click.open_file(str(file), encoding="utf-8") as lines:
            yield from _rows(lines, name, field)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{name}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}). Convert it: iconv -t UTF-8 …") from None


def _rows(lines: IO[str], name: str, field: str) -> Iterator[dict[str, Any]]:
    is_json: bool | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if is_json is None:
            is_json = _object(line) is not None
        if not is_json:
            yield {field: line.rstrip("\r\n"), "line": number}
            continue
        row = _object(line)
        if row is None or not isinstance(row.get(field), str):
            raise InputError(f"{name}, line {number}: expected a JSON object with a string '{field}'")
        yield {**row, "line": number}


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def main() -> NoReturn:
    """Entry point."""
    if sys.stdin.isatty() and len(sys.argv) > 1 and sys.argv[-1] == "-":
        console.note("reading documents from the terminal, one a line; end with Ctrl-D")
    console.run(command)
