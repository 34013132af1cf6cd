"""From users with candidates to rankings, on one loaded engine: what notebooks and bulk jobs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vlrank.config import RankingConfig
from vlrank.errors import UserError
from vlrank.reranking.modes import ItemMeta, ModeSpec, shows
from vlrank.reranking.windows import Ranked, Request, rank_lists

if TYPE_CHECKING:
    from vlrank.engines.base import Engine
    from vlrank.reranking.encoding import Encoder

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class UserLists:
    """One user to rank for.

    Attributes:
        history: Item ids, oldest first.
        candidates: Item ids in the retriever's order, best first; no repetitions.
        seed: Of the shuffles; the same user is shuffled the same way in any batch.
    """

    history: Sequence[int]
    candidates: Sequence[int]
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Ranking:
    """One user's ranking.

    Attributes:
        item_ids: Best first.
        scores: float32, aligned, falling; see `windows.Ranked`.
        prompts: Prompts that it took.
        tokens: Their tokens, before any reuse.
        history_cut: Most history items that one of them had to leave out to fit.
        dropped: Candidates left out because they lack what the mode shows.
    """

    item_ids: list[int]
    scores: Float32
    prompts: int
    tokens: int
    history_cut: int
    dropped: int


class NoCandidates(ValueError):
    """Nothing to rank: no candidates, or none that the mode can show."""


@dataclass(slots=True)
class Ranker:
    """Ranks with one engine.

    Attributes:
        engine: The loaded model.
        encoder: Of the same model.
        spec: The mode.
        ranking: Windows, permutations, lengths.
        item_meta: item id -> text and what the mode shows.
        threads: Groups of users in work at once, so that prompts are made while others are scored; more than one needs
            an engine that may be called from several threads.
    """

    engine: Engine
    encoder: Encoder
    spec: ModeSpec
    ranking: RankingConfig
    item_meta: Mapping[int, ItemMeta]
    threads: int = 1
    group: int = field(default=32, kw_only=True)

    def rank(self, users: Sequence[UserLists]) -> list[Ranking | Exception]:
        """Rankings in the order of the users; a user that cannot be ranked has the reason in its place."""
        groups = [users[start : start + self.group] for start in range(0, len(users), self.group)]
        if self.threads == 1 or len(groups) < 2:
            return [ranking for group in groups for ranking in self._rank(group)]
        with ThreadPoolExecutor(self.threads) as pool:
            return [ranking for rankings in pool.map(self._rank, groups) for ranking in rankings]

    def _rank(self, users: Sequence[UserLists]) -> list[Ranking | Exception]:
        histories = [[self._meta(item) for item in user.history if self._usable(item)] for user in users]
        listed = [[item for item in user.candidates if self._usable(item)] for user in users]
        kept = [candidates[: self.ranking.top_k] for candidates in listed]
        tokens, prompts, cut = ([0] * len(users) for _ in range(3))

        def score(requests: list[Request]) -> list[Float32 | Exception]:
            answers: list[Float32 | Exception] = []
            encoded = []
            for i, indices in requests:
                try:
                    prompt = self.encoder.encode(histories[i], [self._meta(kept[i][at]) for at in indices])
                except (OSError, ValueError) as error:  # an unreadable picture, a prompt that is too long
                    answers.append(error)
                    continue
                answers.append(RuntimeError("not scored"))
                encoded.append((len(answers) - 1, prompt))
                tokens[i] += len(prompt.ids)
                prompts[i] += 1
                cut[i] = max(cut[i], prompt.history_cut)
            scored = self.engine.score_labels(self.encoder, [prompt for _, prompt in encoded])
            for (at, _), answer in zip(encoded, scored, strict=True):
                answers[at] = answer
            return answers

        outcomes = rank_lists(
            [len(candidates) for candidates in kept],
            score,
            size=self.ranking.window,
            stride=self.ranking.stride,
            shuffles=self.ranking.permutations,
            seeds=[user.seed for user in users],
        )
        result: list[Ranking | Exception] = []
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Ranked) and kept[i]:
                items = [kept[i][at] for at in outcome.order]
                dropped = len(users[i].candidates) - len(listed[i])
                result.append(Ranking(items, outcome.scores, prompts[i], tokens[i], cut[i], dropped))
            elif isinstance(outcome, Ranked):
                why = f"none of the {len(users[i].candidates)} candidates has {self.spec.shows}"
                result.append(NoCandidates(why if users[i].candidates else "no candidates"))
            else:
                result.append(outcome)
        return result

    def _usable(self, item: int) -> bool:
        return self.ranking.missing == "text" or shows(self.spec, self._meta(item))

    def _meta(self, item: int) -> ItemMeta:
        try:
            return self.item_meta[item]
        except KeyError:
            raise UserError(
                f"item {item} is not in item_meta", "Give every item of histories and candidates its text."
            ) from None
