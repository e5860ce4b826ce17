"""How often long documents are found when they are truncated to 512 tokens, or scored in chunks of 512.

For each judged query of a retrieval set, one of its relevant passages is hidden at a random place among random others,
so that together they have over 8,000 tokens. It is ranked against long documents of other passages alone.

    python parity_tests/tools/long_documents.py ARTIFACT ../shared/data/retrieval/scifact --json RESULT
"""

import json
import math
import random
import time
from pathlib import Path

import click
import numpy as np

from ettin.bench.workloads import RetrievalSet, read_beir
from ettin.runtimes import LongDocuments, Runtime, load
from ettin.runtimes.machine import model_name
from ettin.runtimes.score_cache import ScoreCache

POLICIES = {
    "truncate, 512": (512, LongDocuments()),
    "chunks, 512, maximum": (512, LongDocuments("chunks")),
    "chunks, 512, mean of the best 3": (512, LongDocuments("chunks", top_chunks=3)),
}


def hidden(
    data: RetrievalSet, runtime: Runtime, query: str, count: int, tokens: int, rng: random.Random
) -> tuple[list[str], int]:
    """Long documents and the index of the one with a relevant passage."""
    relevant = {document for document, grade in data.qrels[query].items() if grade > 0}
    others = [document for document in data.documents if document not in relevant and data.documents[document]]
    documents = []
    for number in range(count):
        parts, size = [data.documents[rng.choice(sorted(relevant))]] if number == 0 else [], 0
        while size < tokens:
            parts.append(data.documents[rng.choice(others)])
            size += len(runtime.tokenizer.texts([parts[-1]])[parts[-1]])
        rng.shuffle(parts)
        documents.append("\n\n".join(parts))
    order = rng.sample(range(count), count)
    return [documents[index] for index in order], order.index(0)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--queries", default=20, show_default=True)
@click.option("--documents", default=10, show_default=True)
@click.option("--tokens", default=8200, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path))
def command(artifact: Path, data: Path, queries: int, documents: int, tokens: int, output: Path | None) -> None:
    """Rank long documents and print recall@1, nDCG@10 and seconds for each policy."""
    collection, rng = read_beir(data), random.Random(0)
    ranks: dict[str, list[int]] = {name: [] for name in POLICIES}
    seconds = dict.fromkeys(POLICIES, 0.0)
    with load(artifact) as runtime:
        runtime.scheduler.cache = ScoreCache(100_000)  # so that the second policy in chunks takes no time
        for query in rng.sample(sorted(collection.queries), queries):
            texts, wanted = hidden(collection, runtime, query, documents, tokens, rng)
            for name, (length, policy) in POLICIES.items():
                start = time.perf_counter()
                hits = runtime.rank(collection.queries[query], texts, max_length=length, long_documents=policy)
                seconds[name] += time.perf_counter() - start
                ranks[name].append([hit["corpus_id"] for hit in hits].index(wanted) + 1)
        result = {
            "kind": "long-documents",
            "artifact": runtime.manifest.full_name,
            "weights": runtime.manifest.source.id,
            "machine": model_name(),
            "engine": runtime.description,
            "data": f"{data.name}, {queries} queries × {documents} documents of over {tokens} tokens",
            "policies": {
                name: {
                    "recall@1": float(np.mean(np.array(found) == 1)),
                    "ndcg@10": float(np.mean([1 / math.log2(rank + 1) if rank <= 10 else 0.0 for rank in found])),
                }
                | ({} if "mean" in name else {"s_per_document": seconds[name] / len(found) / documents})
                for name, found in ranks.items()
            },
        }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    click.echo(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


if __name__ == "__main__":
    command()
