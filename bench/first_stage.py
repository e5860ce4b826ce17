"""Candidates for reranking: BM25, from a well-kept library, or somebody else's run."""

from pathlib import Path

import bm25s

from ettin.artifacts.errors import InputError
from ettin.bench.beir import RetrievalSet


def bm25_candidates(data: RetrievalSet, count: int, limit: int | None = None) -> dict[str, list[str]]:
    """The `count` best documents of each query by BM25, best first.

    Args:
        data: the retrieval set.
        count: candidates a query.
        limit: queries, at most, in the order of the set; None: all.
    """
    ids = list(data.documents)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(data.documents.values()), show_progress=False), show_progress=False)
    keys = list(data.queries)[:limit]
    tokens = bm25s.tokenize([data.queries[key] for key in keys], show_progress=False)
    found, _ = index.retrieve(tokens, k=min(count, len(ids)), show_progress=False)
    return {key: [ids[at] for at in row] for key, row in zip(keys, found.tolist(), strict=True)}


def run_candidates(data: RetrievalSet, file: Path, count: int, limit: int | None = None) -> dict[str, list[str]]:
    """The `count` best documents of each query by a run file, best first.

    Args:
        data: the retrieval set.
        file: as trec_eval reads it: lines of query, Q0, document, rank, score and name. The score decides, as there.
        count: candidates a query.
        limit: queries, at most, in the order of the set; None: all.

    Raises:
        InputError: not a run file, a document that the set does not have, or none of its queries.
    """
    ranked: dict[str, list[tuple[float, str]]] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            query, _, document, _, score, _ = line.split()
            ranked.setdefault(query, []).append((-float(score), document))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a run file, expected 'query Q0 document rank score name' ({error})") from None
    keys = [key for key in data.queries if key in ranked][:limit]
    if not keys:
        raise InputError(f"{file}: ranks none of the queries of {data.name}")
    found = {key: [document for _, document in sorted(ranked[key], key=lambda row: row[0])[:count]] for key in keys}
    for document in {each for row in found.values() for each in row}:
        if document not in data.documents:
            raise InputError(f"{file}: ranks document '{document}', which {data.name} does not have")
    return found
