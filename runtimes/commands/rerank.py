"""`ettin-rerank`: ranks lines or JSON objects for a query."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from ettin.artifacts.errors import InputError, shown
from ettin.runtimes.commands import console
from ettin.runtimes.loading import load
from ettin.runtimes.long_documents import LongDocuments, taken


@click.command(
    epilog=console.example_epilog(
        "ettin-rerank ettin-reranker-demo/openvino-int8 --query 'red planet' passages.txt",
        "cat passages.jsonl | ettin-rerank ettin-reranker-demo/openvino-int8 --query 'red planet' --json -",
    )
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True), default="-")
@click.option("--query", required=True, help="Query that the documents are ranked for.")
@click.option("--top-k", type=click.IntRange(0), help="Number of results shown.  [default: all]")
@click.option("--field", default="text", show_default=True, help="Key of the document's text in JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON lines instead of a table.")
@console.MAX_LENGTH
@console.PRECISION
@console.long_documents
@console.DEVICE
@console.KEY
@console.THREADS
def command(
    artifact: Path, file: Path, query: str, top_k: int | None, field: str, as_json: bool, **settings: Any
) -> None:
    """Rank the documents in FILE (- or nothing: standard input) for a query, best first.

    Documents are lines of text, or JSON lines if the first line is a JSON object; its other keys are kept in --json
    output. Blank lines are skipped.
    """
    rows = list(_read(file, field))
    policy = LongDocuments().updated(taken(settings))
    with load(artifact, **settings) as runtime:
        texts = [row[field] for _, row in rows]
        hits = runtime.rank(query, texts, top_k=top_k, show_progress_bar=len(rows) > 500, long_documents=policy)
    ranked = [(rank, hit, *rows[hit.pop("corpus_id")]) for rank, hit in enumerate(hits, 1)]
    if as_json:
        for rank, hit, line, row in ranked:
            text = json.dumps({**row, "rank": rank, **hit, "line": line}, ensure_ascii=False)
            click.echo(text.encode("utf-8", "backslashreplace"))  # half of a surrogate pair is JSON, but no UTF-8
    else:
        cells = [[str(rank), f"{hit['score']:.3f}", str(line), shown(row[field])] for rank, hit, line, row in ranked]
        console.table(cells, ["rank", "score", "line", "text"])


def _read(file: Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbers of the lines of a file, each with its document."""
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


def _rows(lines: Iterable[str], name: str, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    is_json: bool | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _json_object(line) if is_json is not False else None
        if is_json is None:
            is_json = row is not None
        if not is_json:
            row = {field: line.rstrip("\r\n")}
        if row is None or not isinstance(row.get(field), str):
            raise InputError(f"{name}, line {number}: expected a JSON object with a string '{field}'")
        yield number, row


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def main() -> NoReturn:
    """Entry point."""
    if sys.stdin.isatty() and len(sys.argv) > 1 and sys.argv[-1] == "-":
        console.note("reading documents from the terminal, one on each line; end with Ctrl-D")
    console.run(command)
