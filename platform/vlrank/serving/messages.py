"""What clients send and get: the bodies of requests and answers, as the OpenAPI page shows them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, field_validator, model_validator

ItemId = StrictInt | StrictStr
UserId = StrictInt | StrictStr

_EXAMPLE: Any = {"user": 7, "candidates": [3, 14, {"text": "Mug, striped", "semantic_summary": "a mug"}], "top_n": 2}


class Refused(Exception):
    """A request that is not answered with a ranking.

    Attributes:
        status: Of HTTP.
        headers: Of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Item(BaseModel):
    """An item that the dataset does not have, or as the client wants it shown."""

    model_config = ConfigDict(extra="forbid")

    id: ItemId | None = Field(None, description="Comes back in the ranking; need not be known to the dataset.")
    text: str = Field(min_length=1, description="What prompts say about the item, as `text` in the dataset.")
    picture: str | None = Field(None, description="http(s) address, or the file in base64 (a data: URL or plain).")
    caption: str | None = Field(None, description="What mode caption shows.")
    semantic_summary: str | None = Field(None, description="What the modes of summaries show.")
    popularity: int = Field(0, ge=0, description="Training interactions, for models with a popularity prior.")


class RankRequest(BaseModel):
    """A user or a history, and the candidates to rank."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [_EXAMPLE]})

    user: UserId | None = Field(
        None,
        description="User of the dataset, whose whole sequence is the history: the dataset's number, or as a string "
        "the name in the source.",
    )
    history: list[ItemId | Item] | None = Field(
        None, description="Items, oldest first, in place of the user's sequence; may be empty."
    )
    candidates: list[ItemId | Item] = Field(
        min_length=1, description="Items in the retriever's order: the dataset's numbers, the source's ids, or items."
    )
    top_n: int | None = Field(None, ge=1, description="Only so many of the best.")
    return_items: bool = Field(False, description="Return what prompts show of each item.")
    mode: str | None = Field(None, description="Refuse to answer in another mode than this.")

    @model_validator(mode="after")
    def _somebody(self) -> RankRequest:
        if self.user is None and self.history is None:
            raise ValueError("give `user`, `history` or both")
        return self


class RankedItem(BaseModel):
    """One place of a ranking."""

    id: ItemId | None = Field(description="As the request has it.")
    index: int = Field(description="Place among the request's candidates, from 0.")
    probability: float = Field(description="Of being next; all sum to 1 where one prompt shows all candidates.")
    score: float = Field(description="The logarithm of the probability, exactly as `vlrank rerank` writes it.")
    item: dict[str, Any] | None = Field(None, description="With return_items: text, caption, semantic_summary.")


class RankAnswer(BaseModel):
    """A ranking, best first."""

    model: str
    mode: str
    ranking: list[RankedItem]
    dropped: list[int] = Field(description="Candidates that lack what the mode shows, by their place in the request.")
    history_cut: int = Field(description="History items left out so that the prompt fits.")
    prompts: int
    tokens: int


class Document(BaseModel):
    """A document as an object; other keys are ignored, as Cohere and Jina do."""

    text: str = Field(min_length=1)
    image: str | None = Field(None, description="http(s) address or base64, for a model that sees pictures.")


class RerankRequest(BaseModel):
    """A request in the form of Cohere and Jina; unknown keys are ignored, because the two differ in theirs."""

    model: str | None = Field(None, description="Any name: the model that runs here answers.")
    query: str = Field(description="The history as text, an item per line, oldest first.")
    documents: list[str | Document] = Field(min_length=1, description="The candidates, in the retriever's order.")
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False

    @field_validator("documents")
    @classmethod
    def _no_empty_document(cls, documents: list[str | Document]) -> list[str | Document]:
        for i, document in enumerate(documents):
            if isinstance(document, str) and not document.strip():
                raise ValueError(f"document {i} is empty")
        return documents


class RerankResult(BaseModel):
    """One place of a ranking."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankAnswer(BaseModel):
    """Cohere's and Jina's answer in one."""

    id: str
    model: str
    results: list[RerankResult]
    usage: dict[str, int]
    meta: dict[str, Any]


class Health(BaseModel):
    """What runs here."""

    status: str = Field(description="`ok`, or `draining` (with status 503) while the server ends.")
    model: str
    mode: str
    version: str


class Problem(BaseModel):
    """The body of an answer with another status than 200."""

    message: str
