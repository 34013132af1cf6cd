"""From users with candidates to rankings, on one loaded engine: what notebooks and bulk jobs share."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from vlrank.compat import hide_extras, hide_torch, patch_torchvision, show_torch
from vlrank.config import EngineConfig, RankingConfig
from vlrank.data.items import ItemMeta
from vlrank.data.picture import UnreadablePicture
from vlrank.engines.models import ModelFolder, on_this_node
from vlrank.engines.resources import maybe_quantised, ranking_engine
from vlrank.engines.scoring import LabelScorer, open_scorer
from vlrank.errors import UserError
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.prompting.modes import ModeSpec, mode_spec, shows
from vlrank.prompting.prior import log_prior
from vlrank.reranking.windows import Ranked, Request, first_requests, rank_lists
from vlrank.storage import location

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class UserLists:
    """One user to rank for.

    Attributes:
        history: Item ids, oldest first.
        candidates: Item ids in the retriever's order, best first; no repetitions.
        seed: Of the shuffles; the same user is shuffled the same way in any batch.
        prompts: The first prompts where another process has made them, see `PromptMaker.first`.
    """

    history: Sequence[int]
    candidates: Sequence[int]
    seed: int = 0
    prompts: bytes | None = None


def user_seed(seed: int, user_id: int) -> int:
    """`UserLists.seed` of a user, from the seed of the stage."""
    return seed * 1_000_003 + user_id


@dataclass(frozen=True, slots=True)
class Ranking:
    """One user's ranking.

    Attributes:
        item_ids: Best first.
        scores: float32, aligned, falling; see `windows.Ranked`.
        prompts: Number of prompts.
        tokens: Tokens of these prompts, cached ones included.
        history_cut: History items left out of the prompt that lost most of them to fit.
        dropped: Candidates left out because they lack what the mode shows.
    """

    item_ids: list[int]
    scores: Float32
    prompts: int
    tokens: int
    history_cut: int
    dropped: int


AGREEMENT = ("compared", "same_first", "common_in_ten", "in_ten", "tau_millionths")
"""Sums over users: see `agreement`."""


def agreement(pairs: Iterable[tuple[Ranking | Exception, Ranking | Exception]]) -> dict[str, int]:
    """How alike two rankings of each user are, as sums over the users that have both.

    Returns:
        `AGREEMENT`: users, those with the same first item, items that the first ten have in common and how many they
        could have, and Kendall's tau times a million.
    """
    sums = dict.fromkeys(AGREEMENT, 0)
    for a, b in pairs:
        if isinstance(a, Exception) or isinstance(b, Exception):
            continue
        places = {item: place for place, item in enumerate(b.item_ids)}
        order = np.asarray([places[item] for item in a.item_ids])
        n = len(order)
        rising = int(np.triu(order[:, None] < order[None], 1).sum())
        tau = 4 * rising / (n * (n - 1)) - 1 if n > 1 else 1.0
        common = len(set(a.item_ids[:10]) & set(b.item_ids[:10]))
        values = (1, int(a.item_ids[0] == b.item_ids[0]), common, min(10, n), round(1e6 * tau))
        sums = {name: sums[name] + value for name, value in zip(AGREEMENT, values, strict=True)}
    return sums


def describe_agreement(sums: Mapping[str, int]) -> str:
    """The sums of `agreement` as shares, for people; at least one user was compared."""
    compared, first, common, ten, tau = (sums[name] for name in AGREEMENT)
    return (
        f"{first / compared:.1%} the same first item, {common / ten:.1%} of the first ten, "
        f"Kendall's tau {tau / compared / 1e6:.3f}"
    )


_SWITCH_S = 5e-4


class NoCandidates(ValueError):
    """Nothing to rank: no candidates, or none that the mode can show."""


class NotFinite(ValueError):
    """Scores that are not finite: sorted, they would still look like a ranking."""

    def __init__(self) -> None:
        super().__init__("the model's scores are not finite; try engine.dtype=bfloat16 or float32")


@dataclass(frozen=True, slots=True)
class PromptItems:
    """The items of a user's prompts.

    Attributes:
        history: The most recent ``max_history`` items that the mode can show, oldest first.
        kept: Candidates that the mode can show, at most ``top_k``.
        candidates: What is shown of them.
        dropped: Candidates before the last kept one that it cannot show.
    """

    history: list[ItemMeta]
    kept: list[int]
    candidates: list[ItemMeta]
    dropped: int


@dataclass(slots=True)
class PromptMaker:
    """Makes the prompts of users.

    Attributes:
        encoder: The model's.
        spec: The mode.
        ranking: Windows, permutations, lengths.
        item_meta: item id -> text and what the mode shows.
        pictures: Checked pictures: path -> why it cannot be read, or None. An item whose picture cannot be read is
            treated like one without a picture. Where the whole field is None pictures are not checked, and one that
            cannot be read fails its users.
    """

    encoder: Encoder
    spec: ModeSpec
    ranking: RankingConfig
    item_meta: Mapping[int, ItemMeta]
    pictures: dict[str, UnreadablePicture | None] | None = None

    def lists(self, user: UserLists) -> PromptItems:
        """The items that the user's prompts show."""
        recent = list(islice(filter(None, map(self._shown, reversed(user.history))), self.ranking.max_history))
        kept: list[int] = []
        candidates: list[ItemMeta] = []
        dropped = 0
        for item in user.candidates:
            if len(kept) == self.ranking.top_k:
                break
            if (meta := self._shown(item)) is None:
                dropped += 1
            else:
                kept.append(item)
                candidates.append(meta)
        return PromptItems(recent[::-1], kept, candidates, dropped)

    def prior(self, lists: PromptItems) -> npt.NDArray[np.float64]:
        """`log_prior` of the kept candidates: float64 [kept]."""
        return log_prior(lists.candidates)

    def encode(self, lists: PromptItems, indices: Sequence[int]) -> Encoded | Exception:
        """The prompt over these of the kept candidates, or why there is none: a broken picture, too many tokens."""
        try:
            prompt = self.encoder.encode(lists.history, [lists.candidates[at] for at in indices])
        except (OSError, ValueError) as error:
            return error
        if self.ranking.permutations > 1 or len(lists.kept) > self.ranking.window:
            return replace(prompt, prefix=self.encoder.shared(prompt.ids))
        return prompt

    def first(self, user: UserLists) -> bytes:
        """The user's first prompts, serialised for `UserLists.prompts`: any process can make them without an engine."""
        lists, ranking = self.lists(user), self.ranking
        requests = first_requests(
            len(lists.kept),
            size=ranking.window,
            stride=ranking.stride,
            shuffles=ranking.permutations,
            seed=user.seed,
        )
        made: list[tuple[list[int], Any]] = []
        for indices in requests:
            prompt = self.encode(lists, indices)
            if isinstance(prompt, Encoded):
                numbers = prompt.n_candidates, prompt.history_cut, prompt.prefix
                made.append((indices, (prompt.ids, prompt.image_paths, prompt.grids, *numbers)))
            else:
                made.append((indices, prompt))
        return pickle.dumps(made, protocol=5)

    def made(self, prompts: bytes | None) -> dict[tuple[int, ...], Encoded | Exception]:
        """The prompts that `first` serialised, by candidate indices."""
        found: dict[tuple[int, ...], Encoded | Exception] = {}
        for indices, content in pickle.loads(prompts) if prompts else ():
            if not isinstance(content, Exception):
                ids, paths, grids, n, cut, prefix = content
                content = Encoded(ids, paths, grids, self.encoder.trie(n), cut, prefix)
            found[tuple(indices)] = content
        return found

    def _shown(self, item: int) -> ItemMeta | None:
        """What the prompt shows of an item; None where it lacks what the mode shows."""
        try:
            meta = self.item_meta[item]
        except KeyError:
            raise UserError(
                f"item {item} is not in item_meta", "Give every item of histories and candidates its text."
            ) from None
        if self.pictures is not None and self.spec.pixels:
            path = meta.get("image_path")
            meta = {**meta, "image_path": None} if path and self._unreadable(item, path) else meta
        return meta if self.ranking.missing == "text" or shows(self.spec, meta) else None

    def _unreadable(self, item: int, path: str) -> bool:
        assert self.pictures is not None
        if path not in self.pictures:
            self.pictures[path] = error = self.encoder.unreadable(path)
            if error:
                warnings.warn(f"item {item} is treated like one without a picture: {error}", stacklevel=2)
        return self.pictures[path] is not None

    def named(self, error: Exception, lists: PromptItems) -> Exception:
        """The error; one about a picture names the candidate."""
        if not isinstance(error, UnreadablePicture):
            return error
        item = next((item for item in lists.kept if self.item_meta[item].get("image_path") == error.path), None)
        return type(error)(error.path, f"{error.reason} (item {item})")


@dataclass(slots=True)
class Ranker:
    """Ranks with one engine.

    Attributes:
        engine: The loaded model.
        prompts: Makes prompts for the same model.
        threads: Groups of users ranked at the same time, so that prompts of one are made while another is scored. More
            than one needs an engine that may be called from several threads.
        group: Users per group.
    """

    engine: LabelScorer
    prompts: PromptMaker
    threads: int = 1
    group: int = field(default=64, kw_only=True)

    def rank(self, users: Sequence[UserLists]) -> list[Ranking | Exception]:
        """One ranking per user, in order; the error in its place where a user cannot be ranked."""
        window = self.prompts.ranking.window
        # Users with several prompts keep memory between them.
        several = self.prompts.ranking.permutations > 1 or any(len(user.candidates) > window for user in users)
        size = self.group // 2 if several else self.group
        groups = [users[start : start + size] for start in range(0, len(users), size)]
        if self.threads == 1 or len(groups) < 2:
            return [ranking for group in groups for ranking in self._rank(group)]
        with ThreadPoolExecutor(self.threads) as pool:
            return [ranking for rankings in pool.map(self._rank, groups) for ranking in rankings]

    def _rank(self, users: Sequence[UserLists]) -> list[Ranking | Exception]:
        maker, ranking = self.prompts, self.prompts.ranking
        lists = [maker.lists(user) for user in users]
        made = [maker.made(user.prompts) for user in users]
        tokens, prompts, cut = ([0] * len(users) for _ in range(3))

        def score(requests: list[Request]) -> list[Float32 | Exception]:
            answers: list[Float32 | Exception] = []
            encoded = []
            for i, indices in requests:
                prompt = made[i].get(tuple(indices)) or maker.encode(lists[i], indices)
                if isinstance(prompt, Exception):
                    answers.append(prompt)
                    continue
                answers.append(RuntimeError("not scored"))
                encoded.append((len(answers) - 1, prompt))
                tokens[i] += len(prompt.ids)
                prompts[i] += 1
                cut[i] = max(cut[i], prompt.history_cut)
            scored = self.engine.score_labels(maker.encoder, [prompt for _, prompt in encoded])
            for (at, _), answer in zip(encoded, scored, strict=True):
                answers[at] = answer if isinstance(answer, Exception) or np.isfinite(answer).all() else NotFinite()
            return answers

        outcomes = rank_lists(
            [len(user.kept) for user in lists],
            score,
            size=ranking.window,
            stride=ranking.stride,
            shuffles=ranking.permutations,
            seeds=[user.seed for user in users],
            priors=[maker.prior(user) for user in lists] if ranking.popularity_prior else None,
        )
        result: list[Ranking | Exception] = []
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Ranked) and lists[i].kept:
                items = [lists[i].kept[at] for at in outcome.order]
                result.append(Ranking(items, outcome.scores, prompts[i], tokens[i], cut[i], lists[i].dropped))
            elif isinstance(outcome, Ranked):
                n = len(users[i].candidates)
                why = f"none of the {n} candidates has a {maker.spec.shown}" if n else "no candidates"
                result.append(NoCandidates(why))
            else:
                result.append(maker.named(outcome, lists[i]))
        return result


def open_ranker(
    folder: ModelFolder, config: EngineConfig, item_meta: Mapping[int, ItemMeta], *, own_process: bool = False
) -> Ranker:
    """Load tokenizer and engine of a model whose mode is known.

    Args:
        folder: The model.
        config: The engine.
        item_meta: See `PromptMaker`.
        own_process: This process does nothing else: what is not needed may look absent in it.
    """
    folder = on_this_node(folder)
    assert folder.mode is not None
    if own_process and ranking_engine(config, folder) == "packed":
        # The thread that launches a row asks for Python's lock hundreds of times, against those that make prompts.
        sys.setswitchinterval(_SWITCH_S)
        hide_extras(bitsandbytes=not maybe_quantised(folder.base))
        if not mode_spec(folder.mode).pixels:
            hide_torch()
    prompts = open_prompts(folder, item_meta)
    show_torch()
    engine = open_scorer(folder, config, prompts.encoder)
    return Ranker(engine, prompts, threads=engine.callers)


def open_prompts(folder: ModelFolder, item_meta: Mapping[int, ItemMeta]) -> PromptMaker:
    """The prompt maker of a model whose mode is known and whose folder is on this node."""
    assert folder.mode is not None
    patch_torchvision()
    spec = mode_spec(folder.mode)
    encoder = Encoder.load(tokenizer_folder(folder), spec, folder.ranking)
    return PromptMaker(encoder, spec, folder.ranking, item_meta)


def tokenizer_folder(folder: ModelFolder) -> str:
    """The folder of a model's tokenizer: its own, else its base model's."""
    own = ("tokenizer_config.json", "tokenizer.json")
    return folder.path if any((location(folder.path) / name).is_file() for name in own) else folder.base
