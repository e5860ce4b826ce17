"""Requests and answers of the HTTP routes: text-embeddings-inference's, and Cohere's and Jina's."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field


class _Request(BaseModel):
    # What is not known here would be ignored without a word: refused instead.
    model_config = ConfigDict(extra="forbid")


class TeiRequest(_Request):
    """`POST /rerank` of text-embeddings-inference."""

    query: str
    texts: Annotated[list[str], FailFast()]  # or each wrong element would cost an error of a kilobyte
    raw_scores: bool = Field(False, description="logits instead of values between 0 and 1")
    return_text: bool = False
    truncate: bool | None = Field(None, description="false: an input that fills the model is refused, not cut")
    truncation_direction: Literal["Right", "right"] = "Right"

    @property
    def passages(self) -> list[str]:
        """The documents."""
        return self.texts


class TeiHit(BaseModel):
    """One text and its score."""

    index: int
    score: float
    text: str | None = None


class Document(_Request):
    """A document as an object."""

    text: str


class RerankRequest(_Request):
    """`POST /v1/rerank` and `/v2/rerank` of Cohere and Jina."""

    model: str | None = Field(None, description="must be the name of what is served, if given")
    query: str
    documents: Annotated[list[str | Document], FailFast()]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False

    @property
    def passages(self) -> list[str]:
        """The documents."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class RerankHit(BaseModel):
    """One document and its relevance, between 0 and 1."""

    index: int
    relevance_score: float
    document: Document | None = None


class Usage(BaseModel):
    """Tokens that were scored."""

    total_tokens: int
    prompt_tokens: int


class RerankResponse(BaseModel):
    """Best first."""

    id: str
    model: str
    results: list[RerankHit]
    usage: Usage
    meta: dict[str, dict[str, str | int]]


class Info(BaseModel):
    """What is served."""

    model_id: str
    model_type: dict[str, dict[str, dict[str, int | str]]]
    max_input_length: int | None
    max_client_batch_size: int
    runtime: str
    version: str


class Failure(BaseModel):
    """Why a request failed, in the words that each kind of client looks for."""

    error: str
    error_type: str
    message: str
