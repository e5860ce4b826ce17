"""Search a collection in two stages and print the time and the ranking quality of each.

A fast retriever proposes documents for each query, and an Ettin reranker puts the best ones first.

    python examples/retrieve_then_rerank.py scifact ettin-reranker-17m-v1/openvino-int8
    python examples/retrieve_then_rerank.py scifact ettin-reranker-17m-v1/openvino-int8 --ask "does zinc shorten colds?"

The collection is a folder in BEIR form: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/test.tsv (or qrels.tsv). The
retriever is BM25, or a sentence-transformers model from the hub with --embedder. The program needs the extra `bench`
and the extra of the artifact's target, and `export` for --embedder.
"""

import time
from collections.abc import Callable
from pathlib import Path

import bm25s
import click
import numpy as np

from ettin.artifacts.metrics import ndcg
from ettin.bench.workloads import RetrievalSet, read_beir
from ettin.runtimes import load

Retrieve = Callable[[str, int], list[str]]


def bm25_retriever(data: RetrievalSet) -> Retrieve:
    """Returns a function that finds the documents which share the most important words with a query."""
    ids = list(data.documents)
    engine = bm25s.BM25()
    engine.index(bm25s.tokenize(list(data.documents.values()), show_progress=False), show_progress=False)

    def retrieve(query: str, count: int) -> list[str]:
        rows, _ = engine.retrieve(
            bm25s.tokenize(query, show_progress=False), k=min(count, len(ids)), show_progress=False
        )
        return [ids[index] for index in rows[0]]

    return retrieve


def embedding_retriever(data: RetrievalSet, model_id: str) -> Retrieve:
    """Returns a function that finds the documents whose vectors are closest to that of a query."""
    from sentence_transformers import SentenceTransformer

    model, ids = SentenceTransformer(model_id), list(data.documents)
    vectors = model.encode(list(data.documents.values()), normalize_embeddings=True, show_progress_bar=True)

    def retrieve(query: str, count: int) -> list[str]:
        scores = vectors @ model.encode(query, normalize_embeddings=True)
        return [ids[index] for index in np.argsort(-scores, kind="stable")[:count]]

    return retrieve


@click.command()
@click.argument("collection", type=click.Path(path_type=Path))
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--ask", help="Show the best documents for this query instead of measuring.")
@click.option("--embedder", help="Hub id of a sentence-transformers model that retrieves.  [default: BM25]")
@click.option(
    "--candidates", default=100, show_default=True, help="Number of documents that the retriever proposes for a query."
)
@click.option("--queries", default=50, show_default=True, help="Number of queries to measure with.")
def main(
    collection: Path, artifact: Path, ask: str | None, embedder: str | None, candidates: int, queries: int
) -> None:
    """Search COLLECTION in two stages, the second with ARTIFACT."""
    data = read_beir(collection)
    started = time.perf_counter()
    retrieve = embedding_retriever(data, embedder) if embedder else bm25_retriever(data)
    click.echo(f"index {len(data.documents)} documents: {time.perf_counter() - started:.1f} s")
    with load(artifact, max_length=512) as reranker:
        if ask:
            ids = retrieve(ask, candidates)
            for hit in reranker.rank(
                ask, [data.documents[document_id] for document_id in ids], top_k=5, return_documents=True
            ):
                click.echo(f"{hit['score']:7.3f}  {hit['text'][:100]}")
            return
        times: dict[str, list[float]] = {"retrieve": [], "rerank": []}
        quality: dict[str, list[float]] = {"retrieve": [], "rerank": []}
        for key, query in list(data.queries.items())[:queries]:
            started = time.perf_counter()
            ids = retrieve(query, candidates)
            times["retrieve"].append(time.perf_counter() - started)
            started = time.perf_counter()
            hits = reranker.rank(query, [data.documents[document_id] for document_id in ids])
            times["rerank"].append(time.perf_counter() - started)
            quality["retrieve"].append(ndcg(ids, data.qrels[key]))
            quality["rerank"].append(ndcg([ids[hit["corpus_id"]] for hit in hits], data.qrels[key]))
    for stage, seconds in times.items():
        click.echo(f"{stage:9}{1000 * np.median(seconds):6.0f} ms per query, nDCG@10 {np.mean(quality[stage]):.3f}")


if __name__ == "__main__":
    main()
