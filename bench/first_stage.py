"""Candidates for reranking: BM25, from a well-kept library."""

import bm25s

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
