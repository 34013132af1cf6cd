"""How the demo's models came to be: ``python bench/pretrain.py text|vision|captioner OUT.safetensors``.

A real Qwen can read a numbered list, tell what a picture shows and find the line that fits a description long before it
is fine-tuned. A model with random weights cannot, and learning it takes more tokens than a laptop reads in a demo. So
the tiny models are pre-trained once, on one CPU core, and their weights ship with vlrank:

    text text.safetensors --steps 1200
    vision vision.safetensors --steps 2000 --start_from text.safetensors
    captioner captioner.safetensors

What the two that rank are taught, on freshly drawn products (never those of a demo's shop), styles and colours always
independent:

- **point**: a numbered list of products that all differ, some products that were read before, and the number of the
  one line that has their style and colour (or style and kind). In text, and (vision) with pictures for lines.
- **caption** and **summarise** (vision): the generation prompts, answered from the picture.

Reading a list is a matter of where to look, and a model this small finds that out late or never. So attention is guided
(after Deshpande and Narasimhan, "Guiding Attention for Self-Supervised Learning with Transformers", 2020): an auxiliary
loss asks one head of the first layer to look at the token before, some heads of the second to look from a line's words
to its number and picture and from an answer to what was read before, and the third layer to look from an answer to the
line that it names. Matrices are trained with Muon (Jordan et al. 2024), which needs a tenth of AdamW's tokens here.

What they are *not* taught: anything about users. That a history strays from its owner's taste, which styles go with
which colours (`shop.HOME_COLOUR`) and what sells best is left to fine-tuning.

The captioner is a model of its own, because one this small learns either to see well or to read lists well. It answers
the two generation prompts about pictures of nine visual tokens, and ranks nothing.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import io
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from vlrank.compat import patch_torchvision
from vlrank.config import What
from vlrank.data.items import ItemMeta
from vlrank.demo.base_models import (
    CAPTIONER_SIDE,
    CAPTIONER_SIZES,
    CELL,
    DEMO_SIZES,
    PATCH,
    corpus,
    picture_options,
    text_model,
    train_tokenizer,
    vision_model,
)
from vlrank.demo.captions import caption_accuracy
from vlrank.demo.shop import BRANDS, COLOURS, KINDS, PATTERNS, STYLES, Product, draw, make_products, picture_bytes
from vlrank.generation.prompts import load_prompt
from vlrank.prompting.chat_template import render_messages
from vlrank.prompting.modes import mode_spec
from vlrank.prompting.prompts import RankingPrompt, build_prompt, item_line, render

T = TypeVar("T")
Family = Literal["text", "vision"]
PICTURES_PER_BATCH = 72
"""Pictures that go through the vision tower per step; all prompts of the batch show some of them."""

_COLOURS = tuple(COLOURS)
END = "<|im_end|>"
TURNS = 6
_PRINT_EVERY = 50


@dataclass(frozen=True, slots=True)
class Thing:
    """A product that is not in any shop; ``picture`` is its place among the batch's pictures, -1 without one."""

    style: str
    colour: str
    kind: str
    pattern: str
    brand: str
    picture: int = -1


def caption(colour: str, pattern: str, kind: str) -> str:
    """The caption that models with pictures are taught, e.g. ``A blue striped mug.``"""
    seen = colour if pattern == "plain" else f"{colour} {pattern}"
    return f"A {seen} {kind.lower()}."


def summary(style: str, colour: str, kind: str) -> str:
    """The summary that models with pictures are taught, e.g. ``A Nordic mug in blue.``"""
    article = "An" if style[0] in "AEIOU" else "A"
    return f"{article} {style} {kind.lower()} in {colour}."


def _pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    # Generator.choice takes ten times as long.
    return values[int(rng.integers(len(values)))]


def _meta(thing: Thing) -> ItemMeta:
    return {
        "text": f"{thing.style} {thing.kind} | {thing.brand} | Home > {thing.kind}s",
        "caption": caption(thing.colour, thing.pattern, thing.kind),
        "semantic_summary": summary(thing.style, thing.colour, thing.kind),
        "image_path": str(thing.picture),
    }


Span = tuple[int, int]
"""Tokens from, up to."""


@dataclass(slots=True)
class Row:
    """One conversation.

    Attributes:
        ids, labels: Tokens, and the answers' tokens (-100 elsewhere).
        slots: The pictures shown, as places among the batch's pictures.
        gather: (token of a line, token to look at): its number's first digit, the last one, its picture (or the digit).
        answers: (token, what was read before, the line that the answer names).
    """

    ids: list[int]
    labels: list[int]
    slots: list[int]
    gather: list[tuple[int, int, int, int]] = field(default_factory=list)
    answers: list[tuple[int, list[Span], Span]] = field(default_factory=list)


Bank = list[tuple[str, str, str]]
"""Kind, colour and pattern of every picture."""


class Lessons:
    """Endless batches: token ids, labels and the pictures they show.

    Args:
        family: ``text`` leaves out everything with pictures.
        tokenizer: From `train_tokenizer`.
        bank: Kind, colour and pattern of every picture that can be shown; empty without pictures.
        batch: Conversations per batch.
        grow: Batches after which lists reach their full length of 20 lines.
    """

    def __init__(self, family: Family, tokenizer: Any, bank: Bank, batch: int, grow: int, seed: int) -> None:
        self.family, self.tokenizer, self.bank = family, tokenizer, bank
        self.batch, self.grow, self.seed = batch, grow, seed
        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._telling = np.zeros(len(tokenizer), bool)
        for word in (*STYLES, *COLOURS, *KINDS, *map(str.lower, KINDS)):
            self._telling[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]] = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        for number in itertools.count():
            yield self._make(rng, min(20, 4 + 16 * number // self.grow))

    def _make(self, rng: np.random.Generator, longest: int) -> dict[str, Any]:
        shown = rng.choice(len(self.bank), PICTURES_PER_BATCH, replace=False) if self.bank else np.zeros(0, np.int64)
        pictures = [self.bank[i] for i in shown]
        rows = []
        for _ in range(self.batch):
            kind = rng.random()
            if self.family == "text" or kind < 0.2:
                rows.append(self._point(rng, longest, _pick(rng, ("caption", "semantic_summary", "plain")), []))
            elif kind < 0.65:
                rows.append(self._point(rng, longest, "raw_image", pictures))
            else:
                rows.append(self._describe(rng, pictures))
        width = -(-max(len(row.ids) for row in rows) // 32) * 32
        ids = np.zeros((self.batch, width), np.int64)
        labels = np.full((self.batch, width), -100, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)], labels[i, : len(row.ids)] = row.ids, row.labels
        gather = [(i, *looks) for i, row in enumerate(rows) for looks in row.gather]
        answers = [(i, *answer) for i, row in enumerate(rows) for answer in row.answers]
        before, named = (np.zeros((len(answers), width), bool) for _ in range(2))
        for at, (_, _, spans, line) in enumerate(answers):
            for start, end in spans:
                before[at, start:end] = True
            named[at, slice(*line)] = True
        telling = self._telling[ids[[i for i, *_ in answers]]]  # where kind, style and colour are named
        return {
            "ids": ids,
            "labels": labels,
            "slots": np.array([slot for row in rows for slot in row.slots], np.int64),
            "pictures": shown,
            "tokens": sum(len(row.ids) for row in rows),
            "gather": np.array(gather, np.int64).reshape(-1, 5),
            "answers": np.array([(i, at) for i, at, _, _ in answers], np.int64).reshape(-1, 2),
            "before": before & telling,
            "named": named & telling,
        }

    # ---- lessons ----------------------------------------------------------------------------------------------------

    def _thing(
        self,
        rng: np.random.Generator,
        pictures: Bank,
        *,
        style: str | None = None,
        colour: str | None = None,
        kind: str | None = None,
    ) -> Thing:
        """A random product with the given attributes; with pictures, one whose picture has the colour."""
        at, pattern = -1, _pick(rng, PATTERNS)
        fits = [i for i, (_, seen, _) in enumerate(pictures) if colour in (None, seen)]
        if fits:
            at = _pick(rng, fits)
            kind, colour, pattern = pictures[at]
        return Thing(
            style or _pick(rng, STYLES),
            colour or _pick(rng, _COLOURS),
            kind or _pick(rng, KINDS),
            pattern,
            _pick(rng, BRANDS),
            at,
        )

    def _catalogue(self, rng: np.random.Generator, n: int, form: str, style_alone: bool, pictures: Bank) -> list[Thing]:
        """Products that differ in style or colour (``plain``: in style or kind), the first of them the target."""
        seconds: tuple[str, ...] = KINDS if form == "plain" else _COLOURS
        cells = [(style, second) for style in STYLES for second in seconds]
        chosen = [cells[at] for at in rng.permutation(len(cells))]
        if style_alone:  # nothing else in the list has the target's style
            chosen = chosen[:1] + [cell for cell in chosen[1:] if cell[0] != chosen[0][0]]
        name = "kind" if form == "plain" else "colour"
        return [self._thing(rng, pictures, style=style, **{name: second}) for style, second in chosen[:n]]

    def _point(self, rng: np.random.Generator, longest: int, form: str, pictures: Bank) -> Row:
        n = longest if rng.random() < 0.5 else int(rng.integers(max(2, longest // 2), longest + 1))
        # What a user took is always put in words; the words of raw_image say nothing of colours.
        wordless = form == "raw_image" and rng.random() < 0.3
        target, *others = self._catalogue(rng, n, form, wordless, pictures)
        place = int(rng.integers(n))
        things = [*others[:place], target, *others[place:]]
        keys = ("style", "kind") if form == "plain" else ("style",) if wordless else ("style", "colour")

        def like(thing: Thing) -> Thing:
            return self._thing(rng, pictures, **{key: getattr(thing, key) for key in keys})

        read = [like(target) for _ in range(int(rng.integers(1, 7)))]
        chars = int(_pick(rng, (18, 24, 32) if form in ("plain", "raw_image") else (46, 50, 56, 60)))
        words = "plain" if wordless else "caption" if form == "raw_image" else form

        def line(thing: Thing) -> str:
            if words == "plain":
                return item_line(mode_spec("raw_image"), _meta(thing), chars)
            return item_line(mode_spec(words), _meta(thing), max(chars, 46))

        metas = [_meta(thing) for thing in things]
        if form == "raw_image":
            metas = [{**meta, "text": meta["text"][:chars].rstrip()} for meta in metas]
        elif form == "plain":
            metas = [{"text": line(thing)} for thing in things]
        spec = mode_spec("raw_image" if form == "plain" else form)
        history: list[ItemMeta] = [{"text": line(thing)} for thing in read]
        prompt = build_prompt(spec, history, metas, chars if form in ("caption", "semantic_summary") else 60)

        def turns() -> Iterator[tuple[str, int]]:
            for _ in range(0 if wordless else TURNS):
                at = int(rng.integers(n))
                yield line(like(things[at])), at

        row = self._ask(prompt, place, turns())
        row.slots = [thing.picture for thing in things] if form == "raw_image" else []
        return row

    def _ask(self, prompt: RankingPrompt, place: int, turns: Iterable[tuple[str, int]]) -> Row:
        """The prompt, the number of the line in that place, and more questions: what is read, and the line's place."""
        text = render(self.tokenizer, prompt)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        row = Row(list(encoded["input_ids"]), [-100] * len(encoded["input_ids"]), [])
        starts = [offset[0] for offset in encoded["offset_mapping"]]

        def span(start: int, end: int) -> Span:
            return bisect.bisect_left(starts, start), bisect.bisect_left(starts, end)

        lines: list[Span] = []
        list_start = text.index("Candidate items:\n")
        cursor = list_start
        for number in range(1, prompt.n_candidates + 1):
            digits = text.index(f"{number}. ", cursor)
            cursor = text.index("\n", digits)
            lines.append(span(digits + len(str(number)), cursor))
            first, last = lines[-1][0] - len(str(number)), lines[-1][0] - 1
            # A line's picture comes right before its number.
            picture = first - 2 if prompt.image_paths else last
            row.gather += [(token, first, last, picture) for token in range(*lines[-1])]
        history = [span(*match.span(1)) for match in re.finditer(r"\n-( .*)", text[:list_start])]
        self._answer(row, place, history, lines)
        for question, at in turns:
            self._add(row, "\n<|im_start|>user\n-")
            start = len(row.ids)
            self._add(row, f" {question}")
            query = (start, len(row.ids))
            self._add(row, f"{END}\n<|im_start|>assistant\n")
            self._answer(row, at, [query], lines)
        return row

    def _add(self, row: Row, text: str, *, learn: bool = False) -> None:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        row.ids += ids
        row.labels += ids if learn else [-100] * len(ids)

    def _answer(self, row: Row, place: int, read: list[Span], lines: list[Span]) -> None:
        start = len(row.ids)
        self._add(row, f"{place + 1}{END}", learn=True)
        row.answers += [(token, read, lines[place]) for token in range(start - 1, len(row.ids) - 1)]

    def _describe(self, rng: np.random.Generator, pictures: Bank) -> Row:
        thing = self._thing(rng, pictures)
        what = "caption" if rng.random() < 0.5 else "semantic_summary"
        meta = _meta(thing)
        article = f"A {thing.style.lower()} {thing.kind.lower()} by {thing.brand}"
        text = meta["text"] + (f" | {article}" if rng.random() < 0.7 else "")
        messages = load_prompt(None, what).messages(text, with_image=True)
        row = Row([], [], [thing.picture])
        self._add(row, render_messages(self.tokenizer, messages))
        self._add(row, f"{meta[what]}{END}", learn=True)  # type: ignore[literal-required]
        return row


# ---- training -------------------------------------------------------------------------------------------------------


def _picture_bank(copies: int) -> tuple[Bank, npt.NDArray[np.float32]]:
    """Attributes and patches [pictures, 4, patch values] of freshly drawn products."""
    from concurrent.futures import ProcessPoolExecutor

    kinds = [(kind, colour, pattern) for kind in KINDS for colour in COLOURS for pattern in PATTERNS] * copies
    with ProcessPoolExecutor() as pool:
        patches = list(pool.map(_one_picture, range(len(kinds)), kinds, chunksize=16))
    return kinds, np.stack(patches)


def picture_patches(picture: Image.Image, side: int = CELL) -> npt.NDArray[np.float32]:
    """A square picture as the vision tower takes it at ``side`` pixels: [patches, values]; by default 4 patches."""
    patch_torchvision()
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(**picture_options(side * side))
    return np.asarray(processor(images=[picture], return_tensors="np")["pixel_values"], dtype=np.float32)


def _one_picture(number: int, attributes: tuple[str, str, str]) -> npt.NDArray[np.float32]:
    torch.set_num_threads(1)
    return picture_patches(draw(*attributes, seed=[1_000_003, number]))


def _forward(model: Any, ids: torch.Tensor, patches: torch.Tensor | None, slots: torch.Tensor, image_id: int) -> Any:
    """Hidden states and attentions; every picture goes through the tower once however many prompts show it."""
    if patches is None:
        return model.model(input_ids=ids, use_cache=False, output_attentions=True)
    grid = torch.tensor([[1, 2, 2]] * len(patches), device=ids.device)
    seen = model.model.visual(patches.flatten(0, 1), grid_thw=grid, return_dict=True)
    language = model.model.language_model
    mask = ids == image_id
    embeds = language.embed_tokens(ids).clone()
    embeds[mask] = seen.pooler_output[slots].to(embeds.dtype)
    # One token per picture: its three positions are the text's.
    return language(
        inputs_embeds=embeds,
        use_cache=False,
        visual_pos_masks=mask,
        deepstack_visual_embeds=[layer[slots] for layer in seen.deepstack_features],
        output_attentions=True,
    )


def _guidance(attentions: Sequence[torch.Tensor], lesson: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far the guided heads' attention is from where it should be: mean negative log of the mass there.

    Args:
        attentions: Per layer [batch, heads, from, to].
        lesson: From `Lessons`.
    """
    first, second, third = (layer.float() + 1e-5 for layer in attentions[:3])
    row, token, first_digit, last_digit, picture = lesson["gather"].T
    looks = [first[:, 0].diagonal(-1, 1, 2).log().mean()]
    looks += [second[row, head, token, to].log().mean() for head, to in enumerate((first_digit, last_digit, picture))]
    row, token = lesson["answers"].T
    looks += [_spread(second[row, :, token], lesson["before"]), _spread(third[row, :, token], lesson["named"])]
    return -torch.stack(looks).sum()


def _spread(attention: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Log mass on the words, highest when they share it equally: one word alone tells half of what counts.

    Args:
        attention: [answers, heads, to].
        words: Which tokens: [answers, to], bool.
    """
    count = words.sum(-1).clamp(min=1)
    return ((attention.log() * words[:, None]).sum(-1) / count[:, None] + count.log()[:, None]).mean()


def _take_language(model: Any, text_weights: Path) -> None:
    """Start a vision model from a text model, as Qwen3-VL starts from Qwen3."""
    from safetensors.torch import load_file

    state = {
        name.replace("model.", "model.language_model.", 1): value.float()
        for name, value in load_file(text_weights).items()
    }
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{text_weights} does not fit the vision model: {unexpected[:3]}")


def _optimizers(model: Any, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms, biases and the patch projection."""
    embeddings = ("embed", "lm_head", "patch")
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and not any(part in name for part in embeddings)
    ]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(
    family: Family,
    sizes: dict[str, int],
    *,
    steps: int,
    batch: int,
    lr: float,
    muon_lr: float,
    seed: int,
    grow: int,
    start_from: Path | None = None,
) -> Any:
    """Teach a fresh model; prints its accuracy on the way.

    Returns:
        The model, float32.
    """
    torch.set_num_threads(1)  # the sums, and with them the weights, depend on the number of threads
    tokenizer = train_tokenizer(corpus())
    bank, patches = _picture_bank(copies=5) if family == "vision" else ([], np.zeros((0, 4, 1), np.float32))
    model = fresh_model(family, tokenizer, sizes, seed, start_from)
    teach(model, Lessons(family, tokenizer, bank, batch, grow, seed), patches, steps=steps, lr=lr, muon_lr=muon_lr)
    return model


def fresh_model(
    family: Family, tokenizer: Any, sizes: dict[str, int], seed: int, start_from: Path | None = None
) -> Any:
    """A model that has learned nothing yet, or (vision) only what a text model's weights know."""
    model = (vision_model if family == "vision" else text_model)(tokenizer, **sizes, seed=seed)
    language = model.model.language_model if family == "vision" else model.model
    for layer in language.layers:  # attention that starts out sharp learns where to look ten times as fast
        layer.self_attn.q_norm.weight.data.fill_(2.0)
        layer.self_attn.k_norm.weight.data.fill_(2.0)
    if start_from is not None:
        _take_language(model, start_from)
    return model


def teach(
    model: Any, lessons: Lessons, patches: npt.NDArray[np.float32], *, steps: int, lr: float, muon_lr: float
) -> None:
    """Train a model on lessons, in place; prints its accuracy on the way.

    Args:
        model: From `fresh_model`.
        lessons: What it is taught.
        patches: The pictures of ``lessons.bank``: [pictures, 4, patch values].
        steps: Batches.
        lr: AdamW's, for embeddings and norms.
        muon_lr: Muon's, for matrices.
    """
    family, all_patches = lessons.family, torch.from_numpy(patches)
    model.train()
    model.set_attn_implementation("eager")  # the only one that returns attentions
    optimizers = _optimizers(model, lr, muon_lr)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    start, hits, losses, tokens = time.perf_counter(), [], [], 0
    for step, arrays in zip(range(1, steps + 1), lessons, strict=False):
        for group, highest in groups:
            group["lr"] = highest * min(1, step / 20, (steps - step + 1) / (0.4 * steps))
        lesson = {name: torch.as_tensor(value) for name, value in arrays.items()}
        ids, labels, slots = lesson["ids"], lesson["labels"], lesson["slots"]
        shown = all_patches[lesson["pictures"]] if family == "vision" else None
        output = _forward(model, ids, shown, slots, lessons.image_id)
        wanted = labels[:, 1:]
        learned = wanted != -100
        logits = model.lm_head(output.last_hidden_state[:, :-1][learned])
        loss = torch.nn.functional.cross_entropy(logits, wanted[learned])
        guidance = _guidance(output.attentions, lesson)
        (loss + guidance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += int(lesson["tokens"])
        losses.append(loss.item())
        hits.append((logits.argmax(-1) == wanted[learned]).float().mean().item())
        if step % _PRINT_EVERY == 0:
            took = time.perf_counter() - start
            print(
                f"{family} step {step} {took:.0f}s loss {np.mean(losses[-_PRINT_EVERY:]):.3f} "
                f"guidance {guidance.item():.2f} answer tokens right {np.mean(hits[-_PRINT_EVERY:]):.3f} "
                f"{tokens / took:,.0f} tokens/s, {tokens / 1e6:.1f}M",
                flush=True,
            )


# ---- the captioner --------------------------------------------------------------------------------------------------


def train_captioner(*, steps: int, batch: int, lr: float, seed: int, n_pictures: int) -> Any:
    """Teach a fresh captioner to answer the two generation prompts; prints its loss, and its accuracy at the end.

    Args:
        steps: Batches.
        batch: Pictures, each with a prompt, per step.
        lr: AdamW's; most of a step of Muon would be Muon's own.
        seed: Of weights and batches.
        n_pictures: How many products are drawn to learn from.

    Returns:
        The model, float32.
    """
    torch.set_num_threads(1)  # as in `pretrain`
    tokenizer = train_tokenizer(corpus())
    products = make_products(n_pictures, seed=1_000_003)
    patches = torch.from_numpy(_captioner_patches(products))
    model = vision_model(tokenizer, **CAPTIONER_SIZES, seed=seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    rng = np.random.default_rng(seed)
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 20, (steps - step + 1) / (0.5 * steps))
        shown = rng.choice(len(products), batch, replace=False)
        what: What = "caption" if rng.random() < 0.6 else "semantic_summary"
        rows = [_captioner_row(tokenizer, products[i], what, rng) for i in shown]
        inputs, labels = _padded(tokenizer, rows)
        states = model.model(**inputs, **_pixels(patches[torch.from_numpy(shown)]), use_cache=False).last_hidden_state
        wanted = labels[:, 1:]
        logits = model.lm_head(states[:, :-1][wanted != -100])
        loss = torch.nn.functional.cross_entropy(logits, wanted[wanted != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % _PRINT_EVERY == 0:
            took = time.perf_counter() - start
            print(f"captioner step {step} {took:.0f}s loss {np.mean(losses[-_PRINT_EVERY:]):.4f}", flush=True)
        if step % (4 * _PRINT_EVERY) == 0 or step == steps:
            print({part: round(share, 4) for part, share in _held_out(model.eval(), tokenizer).items()}, flush=True)
            model.train()
    return model


def _captioner_row(tokenizer: Any, product: Product, what: What, rng: np.random.Generator) -> tuple[list[int], int]:
    """Token ids of a prompt with its answer, and how many of them are the answer."""
    text = f"{product.title} | {product.brand} | Home > {product.kind}s"
    text += f" | {product.description}" if rng.random() < 0.7 else ""
    if what == "caption":
        answer = caption(product.colour, product.pattern, product.kind)
    else:
        answer = summary(product.style, product.colour, product.kind)
    ids = _captioner_prompt(tokenizer, what, text)
    answer_ids = tokenizer(f"{answer}{END}", add_special_tokens=False)["input_ids"]
    return [*ids, *answer_ids], len(answer_ids)


def _captioner_prompt(tokenizer: Any, what: What, text: str) -> list[int]:
    """Token ids of a generation prompt, with as many visual tokens as a picture of the captioner has."""
    rendered = render_messages(tokenizer, load_prompt(None, what).messages(text, with_image=True))
    visual = (CAPTIONER_SIDE // CELL) ** 2
    rendered = rendered.replace("<|image_pad|>", "<|image_pad|>" * visual)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _padded(tokenizer: Any, rows: Sequence[tuple[list[int], int]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs [rows, longest] padded on the right, and labels with -100 outside of the answers."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (row, answer) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(row) - answer : len(row)] = ids[i, len(row) - answer : len(row)]
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    mask = (ids != tokenizer.pad_token_id).long()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image_id).int()}, labels


def _pixels(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    """A model's picture inputs from patches [pictures, patches, patch values]."""
    side = CAPTIONER_SIDE // PATCH
    return {
        "pixel_values": patches.flatten(0, 1).float(),
        "image_grid_thw": torch.tensor([[1, side, side]] * len(patches)),
    }


def _captioner_patches(products: Sequence[Product]) -> npt.NDArray[np.float16]:
    """Patches of the products' pictures as `vlrank generate` shows them: [products, patches, patch values]."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2) as pool:
        return np.stack(list(pool.map(_captioner_picture, products, chunksize=16)))


def _captioner_picture(product: Product) -> npt.NDArray[np.float16]:
    torch.set_num_threads(1)
    picture = Image.open(io.BytesIO(picture_bytes(product, seed=1_000_003)))
    picture.thumbnail((CAPTIONER_SIDE, CAPTIONER_SIDE), Image.Resampling.BICUBIC)
    return picture_patches(picture, CAPTIONER_SIDE).astype(np.float16)


@functools.cache
def _held_out_products() -> tuple[list[Product], torch.Tensor]:
    products = make_products(576, seed=2_000_003)
    products = [replace(product, source_id=f"SHOP{number:06d}") for number, product in enumerate(products, 500_001)]
    return products, torch.from_numpy(_captioner_patches(products))


def _held_out(model: Any, tokenizer: Any) -> dict[str, float]:
    """`caption_accuracy` on 576 products whose pictures were not learned from."""
    products, patches = _held_out_products()
    prompt = _captioner_prompt(tokenizer, "caption", "")
    inputs, _ = _padded(tokenizer, [(prompt, 0)] * len(products))
    with torch.no_grad():
        answers = model.generate(**inputs, **_pixels(patches), max_new_tokens=12, do_sample=False)[:, len(prompt) :]
    said = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return caption_accuracy(products, {p.source_id: text for p, text in zip(products, said, strict=True)})


def main() -> None:
    """Command line."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description="Pre-train a tiny model of the demo.")
    commands = parser.add_subparsers(dest="model", required=True)
    for name in ("text", "vision", "captioner"):
        captions = name == "captioner"
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("--steps", type=int, default=600 if captions else 800)
        command.add_argument("--batch", type=int, default=48 if captions else 8, help="conversations per step")
        command.add_argument("--lr", type=float, default=2e-3 if captions else 3e-3, help="AdamW's")
        command.add_argument("--seed", type=int, default=0)
        if captions:
            command.add_argument("--n_pictures", type=int, default=2000, help="drawn to learn from")
        else:
            command.add_argument("--muon_lr", type=float, default=0.02, help="for matrices; AdamW has the others")
            command.add_argument("--grow", type=int, default=200, help="steps after which lists have 20 lines")
        if name == "vision":
            command.add_argument("--start_from", type=Path, help="weights of a text model")
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name not in ("model", "out")}
    if args.model == "captioner":
        model, sizes = train_captioner(**options), CAPTIONER_SIZES
    else:
        model, sizes = pretrain(args.model, DEMO_SIZES, **options), DEMO_SIZES
    state = {
        name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(state, args.out, metadata={"sizes": str(sizes)})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
