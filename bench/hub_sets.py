"""Text from the Hugging Face hub: Natural Questions, and NanoBEIR with its first stage."""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from ettin.artifacts.errors import DownloadError, MissingDependency
from ettin.bench.beir import RetrievalSet
from ettin.export.source.resolve import reached

_QUESTIONS = "sentence-transformers/natural-questions"
_NANO = "sentence-transformers/NanoBEIR-en"

# As sentence-transformers' CrossEncoderNanoBEIREvaluator names them: the dataset has a split for each.
NANOBEIR = (
    "ClimateFEVER", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO", "NFCorpus", "NQ", "QuoraRetrieval",
    "SCIDOCS", "ArguAna", "SciFact", "Touche2020",
)  # fmt: skip


def natural_questions() -> list[tuple[str, str]]:
    """Questions and their answers, the release's text for measuring speed.

    Raises:
        DownloadError: the hub can't be reached.
    """
    return [(row["query"], row["answer"]) for row in _rows(_QUESTIONS, "pair/train-*.parquet")]


def nanobeir(name: str) -> tuple[RetrievalSet, dict[str, list[str]]]:
    """One of NanoBEIR's sets, and its BM25 ranking: by query id, document ids, best first.

    Args:
        name: one of `NANOBEIR`.

    Raises:
        DownloadError: the hub can't be reached, or holds something else than expected.
    """
    split = f"Nano{name}"
    documents, queries = (
        {row["_id"]: row["text"] for row in _rows(_NANO, f"{subset}/{split}-*.parquet")}
        for subset in ("corpus", "queries")
    )
    qrels: dict[str, dict[str, float]] = {}
    for row in _rows(_NANO, f"qrels/{split}-*.parquet"):
        found = row["corpus-id"]
        for document in found if isinstance(found, list) else [found]:
            qrels.setdefault(row["query-id"], {})[document] = 1.0
    ranked = {row["query-id"]: list(row["corpus-ids"]) for row in _rows(_NANO, f"bm25/{split}-*.parquet")}
    data = RetrievalSet(split, documents, {key: text for key, text in queries.items() if key in qrels}, qrels)
    return data, {key: ranked[key] for key in data.queries}


def _rows(dataset: str, pattern: str) -> Iterator[dict[str, Any]]:
    """Rows of a dataset's Parquet files, whose paths match; they stay in the hub's cache."""
    try:
        import duckdb
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingDependency("text from the hub", str(error.name), "bench,export") from None
    with reached(dataset, "Or bring text: --data DIR"):
        names = huggingface_hub.list_repo_files(dataset, repo_type="dataset")
        chosen = [name for name in names if fnmatch(name, pattern)]
        if not chosen:
            raise DownloadError(f"{dataset}: holds no {pattern}, expected what it held in 2026")
        files = [huggingface_hub.hf_hub_download(dataset, name, repo_type="dataset") for name in chosen]
    table = duckdb.connect().read_parquet(files)
    for row in table.fetchall():
        yield dict(zip(table.columns, row, strict=True))
