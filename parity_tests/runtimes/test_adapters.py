"""The adapters, over minimal stand-ins of the frameworks' base classes; `interop/systems` has the real packages."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydantic
import pytest

from ettin.artifacts.errors import UsageError
from ettin.runtimes import Runtime, load

QUERY = "Which planet is known as the Red Planet?"
TEXTS = (Path(__file__).parents[2] / "examples" / "planets.txt").read_text().splitlines()
MARS = next(index for index, text in enumerate(TEXTS) if "Mars" in text)


@dataclass
class Document:
    content: str | None
    score: float | None = None


class Component:
    def __call__(self, kind: type) -> type:
        return kind

    def output_types(self, **_: Any) -> Any:
        return lambda method: method


class TextNode:
    def __init__(self, text: str) -> None:
        self.text = text

    def get_content(self, metadata_mode: str) -> str:
        return f"{metadata_mode}: {self.text}"


@dataclass
class NodeWithScore:
    node: TextNode
    score: float | None = None


class ModelMeta(dict[str, Any]):
    @classmethod
    def create_empty(cls, overwrites: dict[str, Any]) -> "ModelMeta":
        return cls(overwrites)


STAND_INS: dict[str, dict[str, Any]] = {
    "langchain_core.cross_encoders": {"BaseCrossEncoder": type("BaseCrossEncoder", (), {})},
    "llama_index.core.bridge.pydantic": {"Field": pydantic.Field, "PrivateAttr": pydantic.PrivateAttr},
    "llama_index.core.postprocessor.types": {"BaseNodePostprocessor": pydantic.BaseModel},
    "llama_index.core.schema": {
        "MetadataMode": type("MetadataMode", (), {"EMBED": "embed"}),
        "NodeWithScore": NodeWithScore,
        "QueryBundle": type("QueryBundle", (), {}),
    },
    "haystack": {
        "Document": Document,
        "component": Component(),
        "default_to_dict": lambda thing, **fields: {"type": type(thing).__name__, **fields},
    },
    "mteb.models": {"ModelMeta": ModelMeta},
}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports an adapter whose framework is a stand-in."""
    for name, content in STAND_INS.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(sys.modules[name]).update(content)
    names = [f"ettin.runtimes.adapters.for_{name}" for name in ("langchain", "llama_index", "haystack", "mteb")]
    yield lambda name: importlib.import_module(f"ettin.runtimes.adapters.for_{name}")
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def runtime(demo_artifacts: dict[tuple[str, str], Path]) -> Iterator[Runtime]:
    with load(demo_artifacts["openvino", "fp32"]) as loaded:
        yield loaded


def test_langchain(adapter: Any, runtime: Runtime) -> None:
    model = adapter("langchain").EttinCrossEncoder(runtime)
    scores = model.score(tuple((QUERY, text) for text in TEXTS))
    assert isinstance(scores, list) and all(isinstance(score, float) for score in scores)
    assert scores == pytest.approx(runtime.predict([(QUERY, text) for text in TEXTS]).tolist(), abs=1e-5)
    assert model.score([]) == []


def test_llama_index(adapter: Any, runtime: Runtime) -> None:
    rerank = adapter("llama_index").EttinRerank(runtime, top_n=2)
    nodes = [NodeWithScore(TextNode(text), 0.5) for text in TEXTS]
    query: Any = type("Query", (), {"query_str": QUERY})
    best = rerank._postprocess_nodes(nodes, query)
    assert len(best) == 2 and best[0].node is nodes[MARS].node and {node.score for node in nodes} == {0.5}
    assert best[0].score == pytest.approx(runtime.predict((QUERY, f"embed: {TEXTS[MARS]}")), abs=1e-4)
    with pytest.raises(UsageError, match="no query to rank nodes for"):
        rerank._postprocess_nodes(nodes, None)


def test_haystack(adapter: Any, demo_artifacts: dict[tuple[str, str], Path]) -> None:
    ranker = adapter("haystack").EttinRanker(demo_artifacts["openvino", "fp32"], top_k=3, settings={"max_length": 40})
    assert ranker.to_dict()["artifact"] == str(demo_artifacts["openvino", "fp32"])
    assert ranker._runtime is None  # a pipeline is built and saved without loading anything
    documents = [*map(Document, TEXTS), Document(None)]
    best = ranker.run(QUERY, documents)["documents"]
    assert len(best) == 3 and best[0].content == TEXTS[MARS] and documents[MARS].score is None
    assert len(ranker.run(QUERY, documents, top_k=99)["documents"]) == len(documents)
    assert ranker.run(QUERY, [])["documents"] == [] and ranker._runtime.max_length == 40
    ranker.close()
    assert ranker.run(QUERY, documents, top_k=1)["documents"][0].content == TEXTS[MARS]
    ranker.close()


def test_mteb(adapter: Any, runtime: Runtime) -> None:
    model = adapter("mteb").EttinCrossEncoder(runtime)
    queries, documents = [{"text": [QUERY] * 3}, {"text": [QUERY]}], [{"text": TEXTS[:3]}, {"text": TEXTS[3:4]}]
    scores = model.predict(queries, documents, task_metadata=None, hf_split="test", hf_subset="default", batch_size=2)
    np.testing.assert_allclose(scores, runtime.predict([(QUERY, text) for text in TEXTS[:4]]), atol=1e-5)
    assert model.mteb_model_meta["model_type"] == ["cross-encoder"]
    assert model.mteb_model_meta["revision"] == runtime.manifest.digest
    with pytest.raises(ValueError, match="zip"):
        model.predict(queries, documents[:1])
