"""From a user's history and candidates to token ids and pixels: one code path for training, validation and reranking.

Pictures are prepared once per file and reused: a popular item appears in thousands of prompts. They are scaled once,
from the file to the size that the model sees, and cut into patches here: 1.5 ms for 256x256 pixels, a tenth of what the
model's own processor takes. Neither torch nor Ray is imported here.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from vlrank.config import RankingConfig
from vlrank.data.items import ItemMeta
from vlrank.data.picture import PictureBroken, UnreadablePicture, read_rgb, upright_size
from vlrank.errors import UserError
from vlrank.prompting.chat_template import check_tokenizer, complete_tokenizer
from vlrank.prompting.labels import LabelTrie
from vlrank.prompting.modes import ModeSpec
from vlrank.prompting.prompts import CANDIDATES, RankingPrompt, build_prompt, render
from vlrank.prompting.token_cache import TokenCache

if TYPE_CHECKING:
    from PIL.Image import Image

Grid = tuple[int, int, int]
"""Patches of a picture: (frames, rows, columns), as in Qwen's ``image_grid_thw``."""

PREPARATION = "draft 2x, bicubic, small"
"""The version of picture preparation. Cached features and rankings are keyed by it: change it when pixels change."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt, ready for a model.

    Attributes:
        ids: Token ids (int32) up to where the answer begins; a picture's placeholder is repeated once per visual token.
        image_paths: Pictures in the order of their placeholders; empty in text modes.
        grids: One per picture.
        trie: The labels "1".."N" and how to read them.
        history_cut: History items left out from the oldest side so that the prompt fits.
        prefix: Leading tokens that further prompts of the same user begin with; 0 where there are no further ones.
    """

    ids: array[int]
    image_paths: tuple[str, ...]
    grids: tuple[Grid, ...]
    trie: LabelTrie
    history_cut: int = 0
    prefix: int = 0

    @property
    def n_candidates(self) -> int:
        """Number of candidates, N."""
        return self.trie.n

    def answer_ids(self, label: int) -> list[int]:
        """Token ids of the answer, ``label`` counted from 0 (candidate 1 is label 0); the end token is last."""
        return list(self.trie.labels[label])


class PromptTooLong(ValueError):
    """The candidates and the question alone exceed ``max_prompt_tokens``."""


K = TypeVar("K")
V = TypeVar("V")


class _Recent(Generic[K, V]):
    """The ``size`` most recently used values of a function."""

    def __init__(self, make: Callable[[K], V], size: int) -> None:
        self.make, self.size, self.values = make, size, OrderedDict[K, V]()

    def __call__(self, key: K) -> V:
        if key in self.values:
            self.values.move_to_end(key)
        else:
            self.values[key] = self.make(key)
            if len(self.values) > self.size:
                self.values.popitem(last=False)
        return self.values[key]


class Encoder:
    """Turns prompts into token ids and pixels with one model's tokenizer and image processor.

    Args:
        tokenizer: A Hugging Face tokenizer.
        spec: The mode.
        ranking: Lengths: ``max_history``, ``max_item_chars``, ``max_prompt_tokens``, ``max_image_pixels``.
        image_processor: Qwen-VL's; needed in raw_image only.
        cached_pictures: Prepared pictures kept in memory (about 1.2 MB each at 224x224).
    """

    def __init__(
        self,
        tokenizer: Any,
        spec: ModeSpec,
        ranking: RankingConfig,
        image_processor: Any = None,
        cached_pictures: int = 512,
    ) -> None:
        if spec.pixels and image_processor is None:
            raise UserError(
                f"mode {spec.name} shows pictures, but the model has no image processor", "Use a vision model."
            )
        self.tokenizer, self.spec, self.ranking, self.image_processor = tokenizer, spec, ranking, image_processor
        self._token_ids = TokenCache(tokenizer)
        self._tries: dict[int, LabelTrie] = {}
        self._grids: dict[str, Grid] = {}
        self._headline: bytes | None = None
        self._pixels = _Recent(self._prepare, cached_pictures)
        self.image_token_id: int | None = None
        if image_processor is not None:
            self.image_token_id = _placeholder(tokenizer, image_processor)
            repeats = image_processor.temporal_patch_size * image_processor.patch_size**2
            self._mean, self._std = (
                np.repeat(np.asarray(values, dtype=np.float32) / np.float32(image_processor.rescale_factor), repeats)
                for values in (image_processor.image_mean, image_processor.image_std)
            )

    @classmethod
    def load(cls, folder: str | Path, spec: ModeSpec, ranking: RankingConfig, **kwargs: Any) -> Encoder:
        """The encoder for a model folder or Hugging Face name.

        Raises:
            UserError: no tokenizer there, one that no prompt can be made with, or no image processor where the mode
                needs one.
        """
        from transformers import AutoImageProcessor, AutoTokenizer

        # Prompts come one at a time; handing each to a thread pool costs up to 45 ms on a busy machine.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            tokenizer = complete_tokenizer(AutoTokenizer.from_pretrained(folder), folder)
            if not tokenizer("1", add_special_tokens=False)["input_ids"]:
                raise ValueError("its vocabulary is empty")  # transformers loads a folder without tokenizer.json
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"model {folder} has no tokenizer that can be loaded: {str(error).splitlines()[0]}",
                "Copy tokenizer.json and tokenizer_config.json of its base model into the folder.",
            ) from None
        processor = None
        if spec.pixels:
            try:
                processor = AutoImageProcessor.from_pretrained(folder)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"model {folder} has no image processor for mode {spec.name}: {str(error).splitlines()[0]}",
                    "Use a vision model's folder with preprocessor_config.json.",
                ) from None
        check_tokenizer(tokenizer, folder, pictures=spec.pixels)
        return cls(tokenizer, spec, ranking, processor, **kwargs)

    def trie(self, n: int) -> LabelTrie:
        """The labels "1".."n" in this tokenizer."""
        if n not in self._tries:
            self._tries[n] = LabelTrie.of(self.tokenizer, n)
        return self._tries[n]

    def encode(self, history: Sequence[ItemMeta], candidates: Sequence[ItemMeta]) -> Encoded:
        """One prompt. History is cut to ``max_history`` and then, oldest first, until ``max_prompt_tokens`` holds.

        Raises:
            PromptTooLong: the candidates and the question alone are too long.
            UnreadablePicture: a picture cannot be read.
        """
        recent = list(history)[-self.ranking.max_history :]

        def encoded(cut: int) -> Encoded:
            prompt = build_prompt(self.spec, recent[cut:], candidates, self.ranking.max_item_chars)
            return self.encode_prompt(prompt, history_cut=cut)

        whole = encoded(0)
        if self._fits(whole):
            return whole
        low, high = 1, len(recent)  # the smallest cut that fits
        if not recent or not self._fits(encoded(high)):
            bare = encoded(len(recent))
            raise PromptTooLong(
                f"{len(candidates)} candidates and the question take {len(bare.ids)} tokens, "
                f"more than max_prompt_tokens {self.ranking.max_prompt_tokens}; lower window or max_item_chars"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(encoded(middle)) else (middle + 1, high)
        return encoded(low)

    def shared(self, ids: array[int]) -> int:
        """Leading tokens of a prompt that do not depend on its candidates; 0 where their headline is not found."""
        if self._headline is None:
            self._headline = array("i", self.tokenizer(CANDIDATES, add_special_tokens=False)["input_ids"]).tobytes()
        whole = ids.tobytes()
        found = whole.find(self._headline)
        while found % ids.itemsize and found > 0:  # across tokens
            found = whole.find(self._headline, found + 1)
        return max(0, found) // ids.itemsize

    def encode_prompt(self, prompt: RankingPrompt, history_cut: int = 0) -> Encoded:
        """Token ids of a prompt as it stands, without a length limit."""
        trie = self.trie(prompt.n_candidates)
        ids = self._token_ids(render(self.tokenizer, prompt))
        if trie.drop:
            ids = ids[: -trie.drop]
        if not self.spec.pixels:
            return Encoded(ids, (), (), trie, history_cut)
        grids = tuple(self.grid(path) for path in prompt.image_paths)
        return Encoded(self._expand(ids, grids), prompt.image_paths, grids, trie, history_cut)

    def grid(self, path: str) -> Grid:
        """Patches of a picture once prepared, from the file's header alone.

        Raises:
            UnreadablePicture: no picture, or a strip that the image processor refuses.
        """
        if path not in self._grids:
            from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

            width, height = _shrunk(*upright_size(path), self.ranking.max_image_pixels)
            processor = self.image_processor
            patch = processor.patch_size
            try:
                rows, columns = smart_resize(
                    height,
                    width,
                    factor=patch * processor.merge_size,
                    min_pixels=self.picture_size["shortest_edge"],
                    max_pixels=self.picture_size["longest_edge"],
                )
            except ValueError as error:
                raise PictureBroken(path, str(error)) from None
            self._grids[path] = (1, rows // patch, columns // patch)
        return self._grids[path]

    @property
    def picture_size(self) -> dict[str, int]:
        """Minimum and maximum pixels of a prepared picture, as image processors take them (``size``)."""
        size = self.image_processor.size
        # A model's own minimum (Qwen3-VL's is 256x256) would undo the scaling down to ``max_image_pixels``.
        least = min(size["shortest_edge"], self.ranking.max_image_pixels)
        return {"shortest_edge": least, "longest_edge": size["longest_edge"]}

    def visual_tokens(self, grid: Grid) -> int:
        """Tokens of a picture in the prompt."""
        return int(np.prod(grid)) // self.image_processor.merge_size**2

    def pixels(self, path: str) -> npt.NDArray[np.float32]:
        """A prepared picture, float32 [patches, patch values], as Qwen's ``pixel_values``; the latest are cached."""
        return self._pixels(path)

    def patches(self, path: str) -> npt.NDArray[np.uint8]:
        """`pixels` before normalisation, uint8 [patches, patch values]; not cached.

        Patches are in the order in which the tower merges them, values in the order channel, frame, row, column; all
        frames of a temporal patch show the same picture.
        """
        processor = self.image_processor
        patch, merge = processor.patch_size, processor.merge_size
        _, rows, columns = self.grid(path)
        values = np.asarray(self.picture(path)).reshape(
            rows // merge, merge, patch, columns // merge, merge, patch, 3
        )  # [row of blocks, row in block, y, column of blocks, column in block, x, channel]
        frames = np.repeat(
            values.transpose(0, 3, 1, 4, 6, 2, 5)[..., None, :, :], processor.temporal_patch_size, axis=5
        )
        return frames.reshape(rows * columns, -1)

    def forget(self, path: str) -> None:
        """Give back what is kept of a picture that will not come again, or will be another one."""
        self._grids.pop(path, None)
        self._pixels.values.pop(path, None)

    def unreadable(self, path: str) -> UnreadablePicture | None:
        """Why a picture cannot be shown; None where it can. Decodes the whole file."""
        try:
            self.patches(path)
        except UnreadablePicture as error:
            return error
        return None

    def normalised(self, patches: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """`patches` normalised by the image processor's mean and standard deviation, float32."""
        return np.asarray((patches - self._mean) / self._std, dtype=np.float32)

    @property
    def pixel_scale(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and standard deviation of patch values, in the order of `patches`; see `normalised`."""
        return self._mean, self._std

    def picture(self, path: str) -> Image:
        """A picture as the model sees it: RGB, upright, in the size of its grid whatever its proportions."""
        from PIL.Image import Resampling

        _, rows, columns = self.grid(path)
        size = (columns * self.image_processor.patch_size, rows * self.image_processor.patch_size)
        image = read_rgb(path, at_least=2 * max(size))
        return image if size == image.size else image.resize(size, Resampling.BICUBIC)

    def positions(self, encoded: Encoded) -> npt.NDArray[np.int64]:
        """Rotary positions [3, T] (time, row, column) as the models' ``get_rope_index``; equal rows for text.

        The next token after the prompt has position ``positions.max() + 1`` in all rows.
        """
        if not encoded.grids:
            return _rising(len(encoded.ids).bit_length())[:, : len(encoded.ids)]
        ids = np.asarray(encoded.ids)
        merge = self.image_processor.merge_size
        shapes = [(frames, rows // merge, columns // merge) for frames, rows, columns in encoded.grids]
        visual = np.flatnonzero(ids == self.image_token_id)
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        # A token of text moves on by one, a picture by its longer side, behind its last token.
        step = np.ones(len(ids), dtype=np.int64)
        step[visual] = 0
        step[visual[ends - 1]] = [max(rows, columns) for _, rows, columns in shapes]
        places = np.tile(np.cumsum(step) - step, (3, 1))
        places[:, visual] += np.concatenate([_within(shape) for shape in shapes], axis=1)
        return places

    def _fits(self, encoded: Encoded) -> bool:
        return len(encoded.ids) <= self.ranking.max_prompt_tokens

    def _expand(self, ids: array[int], grids: tuple[Grid, ...]) -> array[int]:
        if ids.count(self.image_token_id) != len(grids):  # type: ignore[arg-type]
            raise UserError(
                f"the chat template shows {ids.count(self.image_token_id)} of {len(grids)} pictures",  # type: ignore[arg-type]
                "Use a vision model's folder with its own chat_template.jinja.",
            )
        expanded, left = array("i"), iter(grids)
        for token in ids:
            expanded.extend(repeat(token, self.visual_tokens(next(left)) if token == self.image_token_id else 1))
        return expanded

    def _prepare(self, path: str) -> npt.NDArray[np.float32]:
        return self.normalised(self.patches(path))


@lru_cache
def _rising(bits: int) -> npt.NDArray[np.int64]:
    """Positions of a text of so many bits of tokens, [3, 2^bits]; not to be changed."""
    positions = np.tile(np.arange(1 << bits), (3, 1))
    positions.flags.writeable = False
    return positions


@lru_cache(maxsize=1024)
def _within(shape: Grid) -> npt.NDArray[np.int64]:
    """Time, row and column of a picture's visual tokens: [3, tokens]."""
    return np.indices(shape).reshape(3, -1)


def _placeholder(tokenizer: Any, image_processor: Any) -> int:
    """Id of a visual token's placeholder.

    Raises:
        UserError: tokenizer or image processor are not of Qwen's vision models, whose pictures are prepared here.
    """
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    unknown = token is None or token == tokenizer.unk_token_id
    lacking = [
        name for name in ("patch_size", "merge_size", "temporal_patch_size") if not hasattr(image_processor, name)
    ]
    if unknown or lacking:
        what = f"a {type(image_processor).__name__} without {lacking[0]}" if lacking else "no token <|image_pad|>"
        raise UserError(
            f"pictures cannot be prepared for this model: it has {what}",
            "Use the folder of a Qwen2.5-VL, Qwen3-VL or Qwen3.5 with its tokenizer and preprocessor_config.json.",
        )
    return int(token)


def _shrunk(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    if width * height <= max_pixels:
        return width, height
    scale = (max_pixels / (width * height)) ** 0.5
    return max(1, int(width * scale)), max(1, int(height * scale))
