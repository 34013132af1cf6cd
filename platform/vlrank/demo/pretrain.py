"""How the demo's base models came to be: ``python -m vlrank.demo.pretrain text|vision OUT.safetensors``.

A real Qwen can read a numbered list, tell what a picture shows and find the line that fits a description long before it
is fine-tuned. A model with random weights cannot, and learning it takes more tokens than a laptop reads in a demo. So
the tiny models are pre-trained once, and their weights ship with vlrank. They were made by

    text OUT --layers 3 --minutes 2.4 --batch 32 --grow 1500                       (one H100, 36 million tokens)
    vision OUT --layers 3 --minutes 20 --batch 8 --grow 40 --start_from TEXT       (one CPU core, 5 million tokens)

What they are taught, on freshly drawn products (never those of a demo's shop), styles and colours always independent:

- **point**: a numbered list, then "which line is like these?", with one line that shares a style, a colour or both with
  what was read before; the answer is its number. In text, and (vision) with pictures for lines.
- **caption** and **summarise** (vision): the generation prompts, answered from the picture.

Reading a list is a matter of where to look, and a model this small finds that out late or never. So attention is
guided while it learns (after Deshpande and Narasimhan, "Guiding Attention for Self-Supervised Learning with
Transformers", 2020): an auxiliary loss asks some heads of the second layer to look from a line's words to its number
and picture and from an answer to what was read before, and the third layer to look from an answer to the line that it
names.

What they are *not* taught: anything about users. Which styles go with which colours (`shop.HOME_COLOUR`), that a user's
taste has two halves, and what is popular is left to fine-tuning.
"""

from __future__ import annotations

import argparse
import bisect
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset

from vlrank.data.shop import BRANDS, COLOURS, KINDS, PATTERNS, STYLES, draw
from vlrank.demo.base_models import corpus, picture_patches, text_model, train_tokenizer, vision_model
from vlrank.generation.prompts import load_prompt
from vlrank.reranking.modes import ItemMeta, mode_spec
from vlrank.reranking.prompts import build_prompt, item_line, render, render_messages

T = TypeVar("T")
Family = Literal["text", "vision"]
PICTURES_PER_BATCH = 72
"""Pictures that go through the vision tower per step; all prompts of the batch show some of them."""

_COLOURS = tuple(COLOURS)
_END = "<|im_end|>"
_TURNS = 6


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
    """The caption that the vision model is taught, e.g. ``A blue striped mug.``"""
    seen = colour if pattern == "plain" else f"{colour} {pattern}"
    return f"A {seen} {kind.lower()}."


def summary(style: str, colour: str, kind: str) -> str:
    """The summary that the vision model is taught, from text and picture, e.g. ``A Nordic mug in blue.``"""
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


class Lessons(IterableDataset[dict[str, Any]]):
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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rng = np.random.default_rng([self.seed, worker])
        number = worker
        while True:
            longest = min(20, 4 + 16 * number // self.grow)
            yield self._make(rng, longest)
            number += workers

    def _make(self, rng: np.random.Generator, longest: int) -> dict[str, Any]:
        shown = rng.choice(len(self.bank), PICTURES_PER_BATCH, replace=False) if self.bank else np.zeros(0, np.int64)
        pictures = [self.bank[i] for i in shown]
        rows = []
        for _ in range(self.batch):
            kind = rng.random()
            if self.family == "text" or kind < 0.2:
                rows.append(self._point(rng, longest, _pick(rng, ("caption", "semantic_summary", "plain")), pictures))
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
        return {
            "ids": ids,
            "labels": labels,
            "slots": np.array([slot for row in rows for slot in row.slots], np.int64),
            "pictures": shown,
            "tokens": sum(len(row.ids) for row in rows),
            "gather": np.array(gather, np.int64).reshape(-1, 5),
            "answers": np.array([(i, at) for i, at, _, _ in answers], np.int64).reshape(-1, 2),
            "before": before,
            "named": named,
        }

    # ---- lessons ----------------------------------------------------------------------------------------------------

    def _thing(self, rng: np.random.Generator, pictures: Bank, **fixed: Any) -> Thing:
        """A random product with the given attributes; with pictures, one whose picture has the colour."""
        if pictures:
            fits = [i for i, (_, colour, _) in enumerate(pictures) if fixed.get("colour") in (None, colour)]
            fits = [i for i in fits if pictures[i][1] not in fixed.get("not_colours", ())] or fits
            at = _pick(rng, fits)
            kind, colour, pattern = pictures[at]
        else:
            at = -1
            free = [name for name in _COLOURS if name not in fixed.get("not_colours", ())]
            kind, pattern = _pick(rng, KINDS), _pick(rng, PATTERNS)
            colour = fixed.get("colour") or _pick(rng, free)
        styles = [name for name in STYLES if name not in fixed.get("not_styles", ())]
        return Thing(fixed.get("style") or _pick(rng, styles), colour, kind, pattern, _pick(rng, BRANDS), at)

    def _like(self, rng: np.random.Generator, target: Thing, key: str, pictures: Bank) -> Thing:
        wanted = {"both": {"style": target.style, "colour": target.colour}, "style": {"style": target.style}}
        return self._thing(rng, pictures, **wanted.get(key, {"colour": target.colour}))

    def _unlike(self, rng: np.random.Generator, target: Thing, key: str, pictures: Bank) -> Thing:
        style, colour = {"not_styles": (target.style,)}, {"not_colours": (target.colour,)}
        if key == "both":  # at least one half differs; often only one, or half the list would rule itself out
            choice = rng.integers(3)
            key = "style" if choice == 0 else "colour"
            if choice == 2:
                return self._thing(rng, pictures, **style, **colour)
        return self._thing(rng, pictures, **(style if key == "style" else colour))

    def _point(self, rng: np.random.Generator, longest: int, form: str, pictures: Bank) -> Row:
        n = longest if rng.random() < 0.3 else int(rng.integers(3, longest + 1))
        key = "style" if form == "plain" else _pick(rng, ("both", "both", "style", "colour"))
        spec = mode_spec(form if form != "plain" else "raw_image")
        target = self._thing(rng, pictures)
        place = int(rng.integers(n))
        things = [self._unlike(rng, target, key, pictures) for _ in range(n)]
        things[place] = self._like(rng, target, key, pictures)
        read = [self._like(rng, target, key, pictures) for _ in range(int(rng.integers(1, 7)))]
        read = [self._thing(rng, pictures) if len(read) > 2 and rng.random() < 0.15 else thing for thing in read]
        chars = _pick(rng, (18, 24, 32) if form in ("plain", "raw_image") else (46, 50, 56, 60))

        def line(thing: Thing, as_form: str) -> str:
            if as_form in ("plain", "raw_image"):
                return item_line(mode_spec("raw_image"), _meta(thing), chars)
            return item_line(mode_spec(as_form), _meta(thing), max(chars, 46))

        metas = [_meta(thing) for thing in things]
        if form == "plain":
            for meta in metas:
                meta["image_path"] = None
        history = [_meta(thing) for thing in read]
        if form == "raw_image" and rng.random() < 0.75:
            # What was seen before is put in words, so that words and pixels meet.
            history = [{"text": line(thing, "caption")} for thing in read]
            metas = [{**meta, "text": meta["text"][:chars].rstrip()} for meta in metas]
            chars = 60
        elif form == "raw_image" and key != "style":
            return self._point(rng, longest, form, pictures)  # plain words say nothing of colours
        prompt = build_prompt(spec, history, metas, chars)
        text = render(self.tokenizer, prompt)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        row = Row(list(encoded["input_ids"]), [-100] * len(encoded["input_ids"]), [])
        starts = [offset[0] for offset in encoded["offset_mapping"]]

        def span(start: int, end: int) -> Span:
            return bisect.bisect_left(starts, start), bisect.bisect_left(starts, end)

        lines: list[Span] = []
        list_start = text.index("Candidate items:\n")
        cursor = list_start
        for number in range(1, n + 1):
            digits = text.index(f"{number}. ", cursor)
            cursor = text.index("\n", digits)
            lines.append(span(digits + len(str(number)), cursor))
            first, last = lines[-1][0] - len(str(number)), lines[-1][0] - 1
            # In raw_image a line's picture comes right before its number.
            picture = first - 2 if form == "raw_image" else last
            row.gather += [(token, first, last, picture) for token in range(*lines[-1])]
        read_spans = [span(*match.span(1)) for match in re.finditer(r"\n-( .*)", text[:list_start])]
        self._answer(row, place, read_spans, lines)
        for _ in range(_TURNS):
            at = int(rng.integers(n))
            same = [
                t for t in things if t.style == things[at].style and (form == "plain" or t.colour == things[at].colour)
            ]
            if len(same) > 1:
                continue
            again = self._like(rng, things[at], "style" if form == "plain" else "both", pictures)
            self._add(row, "\n<|im_start|>user\n-")
            start = len(row.ids)
            self._add(row, f" {line(again, 'caption' if form == 'raw_image' else form)}")
            query = (start, len(row.ids))
            self._add(row, f"{_END}\n<|im_start|>assistant\n")
            self._answer(row, at, [query], lines)
        row.slots = [thing.picture for thing in things] if form == "raw_image" else []
        return row

    def _add(self, row: Row, text: str, *, learn: bool = False) -> None:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        row.ids += ids
        row.labels += ids if learn else [-100] * len(ids)

    def _answer(self, row: Row, place: int, read: list[Span], lines: list[Span]) -> None:
        start = len(row.ids)
        self._add(row, f"{place + 1}{_END}", learn=True)
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
        self._add(row, f"{meta[what]}{_END}", learn=True)  # type: ignore[literal-required]
        return row


# ---- training -------------------------------------------------------------------------------------------------------


def _picture_bank(copies: int) -> tuple[Bank, npt.NDArray[np.float32]]:
    """Attributes and patches [pictures, 4, patch values] of freshly drawn products."""
    from concurrent.futures import ProcessPoolExecutor

    kinds = [(kind, colour, pattern) for kind in KINDS for colour in COLOURS for pattern in PATTERNS] * copies
    with ProcessPoolExecutor() as pool:
        patches = list(pool.map(_one_picture, range(len(kinds)), kinds, chunksize=16))
    return kinds, np.stack(patches)


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
    """How far the guided heads' attention is from where it should be: mean negative log of the mass on it.

    Args:
        attentions: Per layer [batch, heads, from, to].
        lesson: From `Lessons`.
    """
    second, third = attentions[1].float(), attentions[2].float()
    row, token, first, last, picture = lesson["gather"].T
    looks = [second[row, head, token, to] for head, to in enumerate((first, last, picture))]
    answer_row, answer = lesson["answers"].T
    looks.append((second[answer_row, 3, answer] * lesson["before"]).sum(-1))
    looks += [(third[answer_row, head, answer] * lesson["named"]).sum(-1) for head in range(2)]
    return torch.stack([-(mass + 1e-5).log().mean() for mass in looks]).sum()


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


def pretrain(
    family: Family,
    sizes: dict[str, int],
    *,
    minutes: float,
    batch: int,
    lr: float,
    seed: int,
    grow: int,
    workers: int,
    guide: float,
    start_from: Path | None = None,
) -> Any:
    """Teach a fresh model for so many minutes; prints its accuracy on the way.

    Returns:
        The model, float32, on the CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(corpus())
    bank, patches = _picture_bank(copies=5) if family == "vision" else ([], np.zeros((0, 4, 1), np.float32))
    all_patches = torch.from_numpy(patches).to(device)
    build = vision_model if family == "vision" else text_model
    model = build(tokenizer, **sizes, seed=seed)
    if start_from is not None:
        _take_language(model, start_from)
    model = model.to(device).train()
    lessons = Lessons(family, tokenizer, bank, batch, grow, seed)
    loader = DataLoader(lessons, batch_size=None, num_workers=workers, prefetch_factor=8)
    model.set_attn_implementation("eager")  # the only one that returns attentions
    every = 200 if device.type == "cuda" else 20
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, hits, losses, tokens = time.perf_counter(), [], [], 0
    for step, lesson in enumerate(loader, start=1):
        passed = (time.perf_counter() - start) / (60 * minutes)
        if passed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * passed)))
        lesson = {name: torch.as_tensor(value).to(device) for name, value in lesson.items()}
        ids, labels, slots = lesson["ids"], lesson["labels"], lesson["slots"]
        shown = all_patches[lesson["pictures"]] if family == "vision" else None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = _forward(model, ids, shown, slots, lessons.image_id)
            wanted = labels[:, 1:]
            learned = wanted != -100
            logits = model.lm_head(output.last_hidden_state[:, :-1][learned]).float()
        loss = torch.nn.functional.cross_entropy(logits, wanted[learned])
        guidance = _guidance(output.attentions, lesson)
        # The guide steps back: at the end the model looks where it likes.
        (loss + guide * (1 - passed) * guidance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(lesson["tokens"])
        losses.append(loss.detach())
        hits.append((logits.argmax(-1) == wanted[learned]).float().mean().detach())
        if step % every == 0:
            took = time.perf_counter() - start
            accuracy, mean = torch.stack(hits[-every:]).mean().item(), torch.stack(losses[-every:]).mean().item()
            print(
                f"{family} {sizes} step {step} {took:.0f}s loss {mean:.3f} guidance {guidance.item():.2f} "
                f"answer tokens right {accuracy:.3f} "
                f"{tokens / took:,.0f} tokens/s, {tokens / 1e6:.0f}M",
                flush=True,
            )
    return model.float().cpu()


def main() -> None:
    """Command line."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description="Pre-train a tiny base model of the demo.")
    parser.add_argument("family", choices=["text", "vision"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--grow", type=int, default=2000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--workers", type=int, default=6, help="processes that write lessons")
    parser.add_argument("--guide", type=float, default=1.0, help="weight of the attention guidance at the start")
    parser.add_argument("--start_from", type=Path, help="vision: weights of a text model of the same sizes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = {"hidden": args.hidden, "layers": args.layers, "heads": args.heads}
    model = pretrain(
        args.family,
        sizes,
        minutes=args.minutes,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        grow=args.grow,
        workers=args.workers,
        guide=args.guide,
        start_from=args.start_from,
    )
    state = {
        name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(state, args.out, metadata={"sizes": str(sizes)})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
