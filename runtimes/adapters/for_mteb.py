"""MTEB 2: a model for its reranking tasks."""

from collections.abc import Iterable, Mapping
from typing import Any

from mteb.models import ModelMeta

from ettin.runtimes.base import Runtime


class EttinCrossEncoder:
    """A runtime as MTEB's cross-encoder (its `CrossEncoderProtocol`): `mteb.evaluate(EttinCrossEncoder(runtime), …)`.

    Results carry the full name of the artifact and, as its revision, the digest that identifies it.

    Args:
        runtime: what `load` returned; it stays the caller's to close.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        manifest = runtime.manifest
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"ettin-export/{manifest.full_name}",
                "revision": manifest.digest,
                "max_tokens": runtime.max_length,
                "modalities": ["text"],
                "model_type": ["cross-encoder"],
            }
        )

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Any]],
        inputs2: Iterable[Mapping[str, Any]],
        *,
        show_progress_bar: bool = False,
        **_: Any,
    ) -> Any:
        """Scores, float32 [pairs], see `Runtime.predict`.

        Args:
            inputs1: batches whose "text" holds queries.
            inputs2: batches whose "text" holds as many documents.
            show_progress_bar: show a progress bar on stderr.
        """
        queries, documents = ([text for batch in loader for text in batch["text"]] for loader in (inputs1, inputs2))
        return self.runtime.predict(list(zip(queries, documents, strict=True)), show_progress_bar=show_progress_bar)
