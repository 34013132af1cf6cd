"""`Qwen3VLReranker`: train, rerank, save and load in a few lines, without a cluster for reranking."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlrank.config import EngineConfig, RankingConfig, TrainConfig, load_config
from vlrank.data.items import ItemMeta
from vlrank.data.tables import atomic_write_json
from vlrank.errors import UserError
from vlrank.prompting.modes import mode_spec
from vlrank.prompting.prior import with_popularity
from vlrank.reranking.ranker import NoCandidates, Ranker, UserLists, open_ranker
from vlrank.storage import Location, fetch_model, location

if TYPE_CHECKING:
    import polars as pl

    from vlrank.engines.models import ModelFolder

Interactions = Mapping[int, Sequence[int]]
"""user id -> item ids, oldest first."""


class Qwen3VLReranker:
    """A multimodal listwise reranker.

    Args:
        mode: What candidates show: raw_image, caption, semantic_summary or semantic_summary_small.
        top_k: Candidates reranked per user; further ones are left out.
        max_history: Most recent items shown.
        model: Base model to train, or a trained model: a run or checkpoint folder, a plain model folder, or a Hugging
            Face name; default the mode's base model.
        engine: ``auto``, ``packed``, ``transformers`` or ``vllm``; see docs/reranking.md.
        **ranking: Further fields of `RankingConfig`: window, stride, permutations, ...

    Raises:
        UserError: an unknown mode or setting.

    Example:
        >>> from vlrank import Qwen3VLReranker
        >>> reranker = Qwen3VLReranker(mode="caption", top_k=50, max_history=20)
        >>> reranker.ranking.top_k
        50
    """

    def __init__(
        self,
        mode: str,
        top_k: int = 50,
        max_history: int = 20,
        model: str | Location | None = None,
        *,
        engine: str = "auto",
        **ranking: Any,
    ) -> None:
        self.spec = mode_spec(mode)
        self.ranking = load_config(RankingConfig, top_k=top_k, max_history=max_history, **ranking)
        # A GPU computes whole rows: short ones answer a single user sooner.
        self.engine_config = load_config(EngineConfig, name=engine, row_tokens=16384, low_latency=True)
        self.model = None if model is None else str(model)
        self.item_meta: Mapping[int, ItemMeta] | None = None
        self._ranker: Ranker | None = None

    @property
    def mode(self) -> str:
        """The mode's name."""
        return self.spec.name

    def fit(
        self,
        train_data: Interactions,
        val_data: Interactions,
        item_meta: Mapping[int, ItemMeta],
        *,
        out: str | Location | None = None,
        **settings: Any,
    ) -> Qwen3VLReranker:
        """Train, and take the best checkpoint.

        Args:
            train_data: user id -> items, oldest first.
            val_data: user id -> validation items; the last one is the target.
            item_meta: item id -> ``{"text", "image_path", "caption", "semantic_summary"}``.
            out: Run folder or URL; default a temporary one.
            **settings: Fields of `TrainConfig`: epochs, lr, batch_size, method, ...

        Raises:
            UserError: unusable data, model or settings.
        """
        from vlrank.training.run import fit

        folder = location(out if out is not None else tempfile.mkdtemp(prefix="vlrank-"))
        # The data is in memory; `dataset` is required and not read.
        given = {"dataset": folder, "out": folder, "mode": self.mode, "model": self.model, **settings}
        config = load_config(TrainConfig, **{"ranking": self.ranking.model_dump(), **given})
        self.close()
        self.model = str(fit(train_data, val_data, item_meta, config))
        self.ranking = config.resolved_ranking
        self.item_meta = with_popularity(item_meta, train_data)
        return self

    def rerank(
        self, history: Sequence[int], candidates: Sequence[int], item_meta: Mapping[int, ItemMeta] | None = None
    ) -> list[tuple[int, float]]:
        """Rank one user's candidates.

        Args:
            history: Item ids, oldest first.
            candidates: Item ids in the retriever's order.
            item_meta: Default the table given to `fit` or `load`.

        Returns:
            (item id, log-probability), best first. The probabilities sum to one where one prompt holds all candidates.

        Raises:
            UserError: an item without meta data, or a user that cannot be ranked.
        """
        [ranking] = self.rerank_batch([history], [candidates], item_meta)
        return ranking

    def rerank_batch(
        self,
        histories: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        item_meta: Mapping[int, ItemMeta] | None = None,
    ) -> list[list[tuple[int, float]]]:
        """`rerank` for many users at once, aligned with the arguments.

        An item whose picture cannot be read is treated like one without a picture, with a warning that names it; a list
        of which no candidate can be shown comes out empty, with a warning.
        """
        if len(histories) != len(candidates):
            raise UserError(f"{len(histories)} histories for {len(candidates)} lists of candidates")
        for row in candidates:
            if len(set(row)) != len(row):
                repeated = next(item for item in row if list(row).count(item) > 1)
                raise UserError(f"candidates name item {repeated} more than once", "Remove the repetitions.")
        ranker = self._open(item_meta)
        users = [UserLists(history, listed) for history, listed in zip(histories, candidates, strict=True)]
        result: list[list[tuple[int, float]]] = []
        for i, (user, ranking) in enumerate(zip(users, ranker.rank(users), strict=True)):
            if isinstance(ranking, NoCandidates) and len(user.candidates):
                warnings.warn(f"the ranking of list {i} is empty: {ranking}", stacklevel=2)
                result.append([])
                continue
            if isinstance(ranking, Exception):
                raise UserError(f"list {i} cannot be ranked: {type(ranking).__name__}: {ranking}") from ranking
            result.append(list(zip(ranking.item_ids, ranking.scores.tolist(), strict=True)))
        return result

    def rerank_frame(
        self, candidates: pl.DataFrame, histories: Interactions, item_meta: Mapping[int, ItemMeta] | None = None
    ) -> pl.DataFrame:
        """Rerank a long frame as RecTools has it.

        Args:
            candidates: ``user_id``, ``item_id`` and ``rank`` (1 is best) or ``score``; a pandas frame is taken too.
            histories: user id -> item ids, oldest first; users without one are ranked without a history.
            item_meta: As in `rerank`.

        Returns:
            A polars frame with ``user_id``, ``item_id``, ``rank`` (from 1), ``score``, in the order of first appearance
            of the users.
        """
        from vlrank.data.candidates_io import lists_to_long, long_to_lists

        lists = long_to_lists(candidates)
        ranked = self.rerank_batch([histories.get(user, ()) for user in lists], list(lists.values()), item_meta)
        return lists_to_long(dict(zip(lists, ranked, strict=True)))

    def save(self, path: str | Path) -> Path:
        """Copy the model to a folder that `load`, transformers, PEFT and vLLM open.

        Raises:
            UserError: nothing trained or loaded yet; ``path`` exists already.
        """
        folder, target = self._folder(), Path(path)
        source = fetch_model(folder.path)  # the base model is not copied, and keeps its name
        if not Path(source).is_dir():
            raise UserError(f"{source} is not a local folder", "Only trained models and local folders can be saved.")
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{target} exists and is not empty", "Choose another path.")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        shutil.copytree(source, staging, dirs_exist_ok=True)
        base = {"base_model": folder.base} if folder.is_adapter else {}
        details = {
            **folder.details,
            "mode": self.mode,
            "family": folder.family,
            "ranking": self.ranking.model_dump(),
            **base,
        }
        atomic_write_json(staging / "vlrank.json", details)
        staging.replace(target)
        return target

    @classmethod
    def load(
        cls,
        path: str | Location,
        *,
        mode: str | None = None,
        item_meta: Mapping[int, ItemMeta] | None = None,
        engine: str = "auto",
        **ranking: Any,
    ) -> Qwen3VLReranker:
        """A reranker from a run folder, a checkpoint, or what `save` wrote.

        Args:
            path: The folder, or its URL.
            mode: Only for models that vlrank did not train.
            item_meta: Kept as the default of `rerank`.
            engine: As in the constructor.
            **ranking: Overrides of the settings that the model was trained with.

        Raises:
            UserError: nothing usable at ``path``.
        """
        from vlrank.engines.models import open_model, unknown_mode

        folder = open_model(path, mode)
        if folder.mode is None:
            raise unknown_mode(folder, "give mode=... as well.")
        reranker = cls(folder.mode, model=path, engine=engine, **{**folder.ranking.model_dump(), **ranking})
        reranker.item_meta = item_meta
        return reranker

    def close(self) -> None:
        """Release the loaded model."""
        if self._ranker is not None:
            self._ranker.engine.close()
            self._ranker = None

    def __enter__(self) -> Qwen3VLReranker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _folder(self) -> ModelFolder:
        from vlrank.config import mode_defaults
        from vlrank.engines.models import open_model

        folder = open_model(self.model or str(mode_defaults(self.mode)["model"]), self.mode)
        return replace(folder, ranking=self.ranking)

    def _open(self, item_meta: Mapping[int, ItemMeta] | None) -> Ranker:
        meta = item_meta if item_meta is not None else self.item_meta
        if meta is None:
            raise UserError("no item_meta", 'Give item_meta, e.g. load_item_meta("data/beauty").')
        if self._ranker is None:
            self._ranker = open_ranker(self._folder(), self.engine_config, meta)
            self._ranker.prompts.pictures = {}
        self._ranker.prompts.item_meta = meta
        return self._ranker
