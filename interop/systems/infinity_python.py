# system: Infinity, torch engine
# artifact: transformers fp32
# requires: infinity-emb[torch]==0.0.78 torch==2.13.0
# largest error: 2e-3
import asyncio
import json
import sys

from infinity_emb import AsyncEmbeddingEngine, EngineArgs

folder, precision = sys.argv[1:]
question = json.load(sys.stdin)


async def scores() -> list[float]:
    arguments = EngineArgs(
        model_name_or_path=folder, engine="torch", device="cpu", dtype="float32", bettertransformer=False,
        model_warmup=False,
    )  # fmt: skip
    engine = AsyncEmbeddingEngine.from_args(arguments)
    async with engine:
        results, _ = await engine.rerank(query=question["query"], docs=question["documents"], raw_scores=True)
    return [float(result.relevance_score) for result in sorted(results, key=lambda result: result.index)]


print(json.dumps(asyncio.run(scores())))
