"""A replica's work between a request and its answer, with the ranker of `vlrank rerank`."""

from __future__ import annotations

import itertools
import traceback
import uuid
from collections import ChainMap
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from vlrank.config import ServeConfig
from vlrank.data.dataset import Dataset
from vlrank.data.items import ItemMeta
from vlrank.data.picture import UnreadablePicture
from vlrank.engines.models import ModelFolder
from vlrank.engines.resources import EngineDied
from vlrank.errors import UserError
from vlrank.prompting.encoding import PromptTooLong
from vlrank.prompting.modes import mode_spec, shows
from vlrank.reranking.plan import reach, shown_items
from vlrank.reranking.ranker import NoCandidates, NotFinite, Ranker, Ranking, UserLists, open_ranker, user_seed
from vlrank.serving.batching import Batcher, Batching
from vlrank.serving.catalogue import Catalogue, item_meta, without_repetitions
from vlrank.serving.messages import (
    Item,
    ItemId,
    RankAnswer,
    RankedItem,
    RankRequest,
    Refused,
    RerankAnswer,
    RerankRequest,
    RerankResult,
)
from vlrank.serving.metrics import Metrics
from vlrank.serving.pictures import InlinePictures
from vlrank.storage import location

Missing = Literal["drop", "text"]
MakePrompts = Callable[[UserLists], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Job:
    """One user for the engine.

    Attributes:
        user: History and candidates. Items of the request have negative numbers that no other request has.
        inline: What prompts show of these.
        missing: See `RankingConfig`.
    """

    user: UserLists
    inline: dict[int, ItemMeta] = field(default_factory=dict)
    missing: Missing = "drop"


class Service:
    """Answers requests; belongs to one event loop.

    Args:
        config: The settings.
        ranker: Of the model.
        catalogue: Of the dataset.
        make_prompts: Makes the first prompts of a user in another process; None makes them beside the engine.
    """

    def __init__(
        self, config: ServeConfig, ranker: Ranker, catalogue: Catalogue, make_prompts: MakePrompts | None = None
    ) -> None:
        self.config, self.catalogue = config, catalogue
        self.name = location(config.model).name
        self.metrics = Metrics()
        self.draining = False
        self.answered = 0
        self.died: EngineDied | None = None
        self._ranker = replace(ranker, threads=1)
        self._ranker.prompts.pictures = {}  # a picture of the dataset that cannot be read costs its item alone
        self._make_prompts = make_prompts
        self._numbers = itertools.count(-1, -1)
        self.pictures = InlinePictures(config.pictures, config.inline_pictures, self._forget)
        batching = Batching.of(ranker.engine.callers, config.users_at_once, config.batch_wait_ms / 1000)
        self.batcher: Batcher[Job, Ranking] = Batcher(
            self._rank, batching, config.max_queue, self.metrics.users.observe
        )
        self.metrics.watch(self._gauges)

    @property
    def mode(self) -> str:
        """The mode's name."""
        return self._ranker.prompts.spec.name

    async def rank(self, request: RankRequest) -> RankAnswer:
        """Rank a request's candidates.

        Raises:
            Refused: it cannot be ranked.
        """
        if request.mode is not None and request.mode != self.mode:
            raise Refused(422, f"mode: this server ranks in mode {self.mode}, not {request.mode!r}")
        with self.batcher.place():
            history: list[ItemId | Item] | None = list(request.history) if request.history is not None else None
            number = None if request.user is None else self.catalogue.user(request.user)
            if history is None and number is not None:
                history = list(self.catalogue.sequence(number))
            seed = 0 if number is None else user_seed(self.config.seed, number)
            job, ranking = await self._ranked(history or [], request.candidates, seed, self._missing)
        places = {item: place for place, item in enumerate(job.user.candidates)}
        kept = set(ranking.item_ids)
        ranked = []
        for item, score in zip(ranking.item_ids, ranking.scores.tolist(), strict=True):
            given = request.candidates[places[item]]
            ranked.append(
                RankedItem(
                    id=given.id if isinstance(given, Item) else given,
                    index=places[item],
                    probability=float(np.exp(score)),
                    score=score,
                    item=self._shown(job, item) if request.return_items else None,
                )
            )
        return RankAnswer(
            model=self.name,
            mode=self.mode,
            ranking=ranked[: request.top_n],
            dropped=[place for item, place in places.items() if item not in kept],
            history_cut=ranking.history_cut,
            prompts=ranking.prompts,
            tokens=ranking.tokens,
        )

    async def rerank(self, request: RerankRequest) -> RerankAnswer:
        """Rank documents; what the mode shows may be a part of their text, or missing.

        Raises:
            Refused: they cannot be ranked.
        """
        history: list[ItemId | Item] = [Item(text=line) for line in request.query.splitlines() if line.strip()]
        texts = [document if isinstance(document, str) else document.text for document in request.documents]
        images = [None if isinstance(document, str) else document.image for document in request.documents]
        documents: list[ItemId | Item] = [
            Item(text=text, picture=image) for text, image in zip(texts, images, strict=True)
        ]
        with self.batcher.place():
            job, ranking = await self._ranked(history, documents, 0, "text")
        places = {item: place for place, item in enumerate(job.user.candidates)}
        results = [
            RerankResult(
                index=places[item],
                relevance_score=float(np.exp(score)),
                document={"text": texts[places[item]]} if request.return_documents else None,
            )
            for item, score in zip(ranking.item_ids, ranking.scores.tolist(), strict=True)
        ]
        return RerankAnswer(
            id=str(uuid.uuid4()),
            model=self.name,
            results=results[: request.top_n],
            usage={"prompt_tokens": ranking.tokens, "total_tokens": ranking.tokens},
            meta={"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        )

    def warm_up(self) -> None:
        """Rank one user: what is compiled at an engine's first prompt keeps no client waiting.

        Raises:
            UserError: the model's scores are not finite.
        """
        prompts = self._ranker.prompts
        spec, drop = prompts.spec, prompts.ranking.missing == "drop"
        usable = (item for item, meta in self.catalogue.meta.items() if not drop or shows(spec, meta))
        candidates = list(itertools.islice(usable, prompts.ranking.window))
        [ranking] = self._ranker.rank([UserLists(self.catalogue.sequence(1), candidates)])
        if isinstance(ranking, NotFinite):
            raise UserError(f"{self.config.model}: {ranking}") from ranking

    def close(self) -> None:
        """Finish what is in work and give the memory back."""
        self.batcher.close()
        self._ranker.engine.close()
        self.pictures.close()

    # ---- from a request to a job ------------------------------------------------------------------------------------

    @property
    def _missing(self) -> Missing:
        return self._ranker.prompts.ranking.missing

    async def _ranked(
        self, history: Sequence[ItemId | Item], candidates: Sequence[ItemId | Item], seed: int, missing: Missing
    ) -> tuple[Job, Ranking]:
        ranking = self._ranker.prompts.ranking
        if len(candidates) > ranking.top_k:
            raise Refused(422, f"candidates: {len(candidates)}, at most {ranking.top_k} are ranked (ranking.top_k)")
        history = history[-reach(ranking) :]
        places = [(f"history.{i}", item) for i, item in enumerate(history)]
        places += [(f"candidates.{i}", item) for i, item in enumerate(candidates)]
        pixels = self._ranker.prompts.spec.pixels
        sources = [
            (f"{where}.picture", item.picture)
            for where, item in places
            if isinstance(item, Item) and item.picture and pixels
        ]
        async with self.pictures.files(sources) as paths:
            files = dict(zip((where for where, _ in sources), paths, strict=True))
            numbers: list[int] = []
            inline: dict[int, ItemMeta] = {}
            for where, item in places:
                if isinstance(item, Item):
                    number = next(self._numbers)
                    inline[number] = item_meta(item, files.get(f"{where}.picture"))
                    if missing == "drop" and where.startswith("candidates"):
                        self._check_shown(where, inline[number])
                    numbers.append(number)
                else:
                    numbers.append(self.catalogue.item(item, where))
            user = UserLists(numbers[: len(history)], numbers[len(history) :], seed)
            without_repetitions(user.candidates)
            if self._make_prompts is not None and not inline:
                user = replace(user, prompts=await self._make_prompts(user))
            job = Job(user, inline, missing)
            return job, await self._score(job)

    def _check_shown(self, where: str, item: ItemMeta) -> None:
        spec = self._ranker.prompts.spec
        if not shows(spec, item):
            key = "picture" if spec.pixels else spec.shows
            raise Refused(422, f"{where}: mode {spec.name} shows the item's {key}, which is missing")

    async def _score(self, job: Job) -> Ranking:
        try:
            ranking = await self.batcher(job)
        except (NoCandidates, PromptTooLong, UnreadablePicture) as error:
            raise Refused(422, str(error)) from error
        except EngineDied as error:
            self.died = error  # the replica is replaced, see `Replica.check_health`
            raise Refused(503, "the engine has failed and is replaced; try again", {"Retry-After": "5"}) from error
        except Exception as error:
            traceback.print_exc()
            raise Refused(500, f"the request could not be ranked: {type(error).__name__}: {error}") from error
        self.answered += 1
        self.metrics.prompts.inc(ranking.prompts)
        self.metrics.tokens.inc(ranking.tokens)
        return ranking

    def _shown(self, job: Job, item: int) -> dict[str, Any]:
        meta = job.inline.get(item) or self.catalogue.meta[item]
        return {key: meta.get(key) for key in ("text", "caption", "semantic_summary")}

    # ---- in the threads of the batcher ------------------------------------------------------------------------------

    def _rank(self, jobs: list[Job]) -> list[Ranking | Exception]:
        answers: list[Ranking | Exception] = [RuntimeError("not ranked")] * len(jobs)
        for missing in dict.fromkeys(job.missing for job in jobs):
            places = [place for place, job in enumerate(jobs) if job.missing == missing]
            ranked = self._ranker_for([jobs[place] for place in places], missing).rank(
                [jobs[place].user for place in places]
            )
            for place, answer in zip(places, ranked, strict=True):
                answers[place] = answer
        return answers

    def _ranker_for(self, jobs: Sequence[Job], missing: Missing) -> Ranker:
        prompts = self._ranker.prompts
        inline = {number: meta for job in jobs for number, meta in job.inline.items()}
        if not inline and missing == self._missing:
            return self._ranker
        return replace(
            self._ranker,
            prompts=replace(
                prompts,
                item_meta=ChainMap(inline, prompts.item_meta),  # type: ignore[arg-type]
                ranking=prompts.ranking.model_copy(update={"missing": missing}),
            ),
        )

    def _forget(self, path: str) -> None:
        self._ranker.prompts.encoder.forget(path)
        assert self._ranker.prompts.pictures is not None
        self._ranker.prompts.pictures.pop(path, None)

    def _gauges(self) -> dict[str, tuple[str, float]]:
        engine = self._ranker.engine
        gauges = {
            "vlrank_waiting_requests": ("Requests that the engine has not begun with.", float(self.batcher.waiting)),
            "vlrank_admitted_requests": ("Requests that hold a place.", float(self.batcher.admitted)),
            "vlrank_cached_tokens_total": (
                "Tokens of prompts whose keys and values the engine had already.",
                float(getattr(engine, "cached_tokens", 0)),
            ),
        }
        return gauges | _gpu_memory()


def _gpu_memory() -> dict[str, tuple[str, float]]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "vlrank_gpu_memory_bytes": ("GPU memory in use by PyTorch.", float(torch.cuda.memory_allocated())),
        "vlrank_gpu_memory_reserved_bytes": ("GPU memory held by PyTorch.", float(torch.cuda.memory_reserved())),
    }


def open_service(
    config: ServeConfig, folder: ModelFolder, make_prompts: MakePrompts | None = None, *, own_process: bool = False
) -> Service:
    """Load the model and the dataset; see `open_ranker`.

    Raises:
        UserError: one of them is unusable.
    """
    dataset = Dataset.open(config.dataset)
    meta = shown_items(dataset, folder, mode_spec(str(folder.mode)))
    ranker = open_ranker(folder, config.engine, meta, own_process=own_process)
    service = Service(config, ranker, Catalogue.of(dataset, meta), make_prompts)
    service.warm_up()
    return service
