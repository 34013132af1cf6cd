"""Lessons on a shop's own photos, for a model that has never seen one (`hm_pixels.py --lessons`).

The lessons are the demo's (`pretrain.py`: find the line that fits, guided attention) with H&M's photos and
words in place of drawn products: which of these pictures shows a black dress, and what does this one show? Words come
from the catalogue: kind (the last category) and colour (of the title). Users and purchases are not in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain import END, PICTURES_PER_BATCH, TURNS, Bank, Family, Lessons, Row, fresh_model, picture_patches, teach
from vlrank.data.items import ItemMeta
from vlrank.demo.base_models import corpus, save_model, train_tokenizer
from vlrank.generation.prompts import load_prompt
from vlrank.prompting.modes import mode_spec
from vlrank.prompting.prompts import build_prompt, render_messages

COLOURS = (
    *("Black", "White", "Blue", "Beige", "Pink", "Red", "Green", "Khaki", "Grey", "Orange", "Yellow", "Brown"),
    *("Gold", "Silver", "Turquoise", "Purple"),
)
UNTITLED = "photo"
"""The text of an item that only its picture describes."""
SIZES = {"hidden": 96, "layers": 3, "heads": 4, "vision_hidden": 128, "vision_layers": 3}
_FEWEST = 20


def words(title: str, categories: Sequence[str]) -> tuple[str, str]:
    """Kind and colour of an H&M product, lower case; colours are folded (dark blue is blue)."""
    named = title.rsplit(", ", 1)[-1]
    colour = next((colour for colour in COLOURS if colour in named), "other")
    return categories[-1].lower(), colour.lower()


def line(kind: str, colour: str) -> str:
    """How a product is put in words, e.g. ``black vest top``."""
    return f"{colour} {kind}"


class PhotoLessons(Lessons):
    """Endless batches, as `Lessons`.

    Args:
        family: ``text`` shows no pictures.
        tokenizer: Knows all words.
        things: Kind, colour (and nothing) of every photo.
        batch: Conversations per batch.
        grow: Batches after which lists reach 20 lines.
    """

    def __init__(self, family: Family, tokenizer: Any, things: Bank, batch: int, grow: int, seed: int) -> None:
        super().__init__(family, tokenizer, things if family == "vision" else [], batch, grow, seed)
        self.things = things
        self._telling[:] = False
        for kind, colour, _ in set(things):
            self._telling[tokenizer(f" {line(kind, colour)}", add_special_tokens=False)["input_ids"]] = True

    def _point(self, rng: np.random.Generator, longest: int, form: str, pictures: Bank) -> Row:
        drawn = pictures or [self.things[i] for i in rng.choice(len(self.things), PICTURES_PER_BATCH, replace=False)]
        asked = ("both", "both", "kind", "colour")[int(rng.integers(4))]

        def key(thing: tuple[str, str, str]) -> tuple[str, ...]:
            return thing[:2] if asked == "both" else thing[:1] if asked == "kind" else thing[1:2]

        # Places among the batch's pictures, one for each key: the answer must be the only one.
        only = {key(drawn[at]): at for at in rng.permutation(len(drawn))}
        n = min(len(only), longest if rng.random() < 0.5 else int(rng.integers(max(2, longest // 2), longest + 1)))
        shown = [only[name] for name in list(only)[:n]]
        place = int(rng.integers(n))
        wanted = drawn[shown[place]]
        titled = [not pictures or bool(rng.random() < 0.5) for _ in shown]
        told = [line(*drawn[at][:2]) if named else UNTITLED for at, named in zip(shown, titled, strict=True)]

        # One line of many may be the one that counts; the others fit none of the candidates.
        read = []
        share = rng.uniform(0.05, 1)
        named_keys = {key(drawn[at]) for at in shown}
        for number in range(int(rng.integers(1, 25))):
            other = self.things[int(rng.integers(len(self.things)))]
            if number == 0 or rng.random() < share:
                kind = other[0] if asked == "colour" else wanted[0]
                colour = other[1] if asked == "kind" else wanted[1]
                read.append(line(kind, colour))
            elif key(other) not in named_keys and rng.random() < 0.5:
                read.append(line(*other[:2]))
            else:
                read.append(UNTITLED)
        read = [read[at] for at in rng.permutation(len(read))]

        spec = mode_spec("raw_image" if pictures else "caption")
        picture: ItemMeta = {"image_path": "photo"} if pictures else {}
        metas: list[ItemMeta] = [{"text": text, **picture} for text in told]
        prompt = build_prompt(spec, [{"text": text} for text in read], metas, 60)
        places = [int(rng.integers(n)) for _ in range(TURNS if asked == "both" else 0)]
        row = self._ask(prompt, place, [(line(*drawn[shown[at]][:2]), at) for at in places])
        row.slots = shown if pictures else []
        return row

    def _describe(self, rng: np.random.Generator, pictures: Bank) -> Row:
        at = int(rng.integers(len(pictures)))
        row = Row([], [], [at])
        messages = load_prompt(None, "caption").messages(UNTITLED, with_image=True)
        self._add(row, render_messages(self.tokenizer, messages))
        self._add(row, f" {line(*pictures[at][:2])}{END}", learn=True)
        return row


def taught_model(
    folder: Path, products: Iterable[tuple[str, Sequence[str], Path]], steps: tuple[int, int], seed: int
) -> Path:
    """A small Qwen3-VL that knows what the products look like.

    Args:
        folder: Of the model.
        products: Title, category path and photo of each; kinds with fewer than 20 photos are left out.
        steps: Lessons without and with pictures.
        seed: Of weights and lessons.

    Returns:
        ``folder``.
    """
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    known = [(*words(title, categories), path) for title, categories, path in products]
    photos = Counter(kind for kind, _, _ in known)
    known = [one for one in known if photos[one[0]] >= _FEWEST and one[1] != "other"]
    things: Bank = [(kind, colour, "") for kind, colour, _ in known]
    patches: list[npt.NDArray[np.float32]] = []
    for *_, path in known:
        with Image.open(path) as photo:
            patches.append(picture_patches(photo.convert("RGB")))
    lines = [f" {line(kind, colour)}\n" for kind, colour, _ in things]
    tokenizer = train_tokenizer([*corpus(), *lines, *(f"- {UNTITLED}\n" for _ in lines)])
    language = folder.with_suffix(".safetensors")
    folder.parent.mkdir(parents=True, exist_ok=True)
    rates = {"lr": 3e-3, "muon_lr": 0.02}
    text_sizes = {name: size for name, size in SIZES.items() if not name.startswith("vision")}
    model = fresh_model("text", tokenizer, text_sizes, seed)
    lessons = PhotoLessons("text", tokenizer, things, 8, 200, seed)
    teach(model, lessons, np.zeros((0, 4, 1), np.float32), steps=steps[0], **rates)
    save_file({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, language)
    model = fresh_model("vision", tokenizer, SIZES, seed, language)
    teach(model, PhotoLessons("vision", tokenizer, things, 8, 200, seed), np.stack(patches), steps=steps[1], **rates)
    return save_model(folder, model, tokenizer)
