"""The tiny models must be complete: transformers, PEFT, Unsloth and vLLM load them like real ones."""

import importlib
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch

from vlrank.config import What, config_dir, read_yaml
from vlrank.demo.base_models import corpus, make_demo_models, train_tokenizer
from vlrank.demo.captions import caption_accuracy
from vlrank.demo.run import N_ITEMS
from vlrank.demo.shop import Product, draw, make_products, picture_bytes
from vlrank.generation.job import DATA, Job, prepare
from vlrank.generation.prompts import load_prompt
from vlrank.generation.writers.transformers import TransformersGenerator
from vlrank.prompting.chat_template import render_messages

Written = tuple[list[Product], dict[What, dict[str, str]]]
"""Products, and per kind of text ``source_id`` -> what the captioner wrote."""


@pytest.fixture(scope="module")
def pretrain() -> Iterator[ModuleType]:
    """The script that made the shipped weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "bench")
        yield importlib.import_module("pretrain")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_demo_models(tmp_path_factory.mktemp("demo-models"))


def test_digits_are_tokens_of_their_own_as_in_qwen() -> None:
    tokenizer = train_tokenizer(corpus())
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12. Mug\n345", add_special_tokens=False)) == [
        *("1", "2", ".", "ĠMug", "Ċ", "3", "4", "5"),
    ]


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = train_tokenizer(corpus())
    text = "Żółw 龍 ☂ \t<b>\n\n  '1234567890'"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_training_the_tokenizer_again_gives_the_shipped_one(models: dict[str, Path]) -> None:
    # The shipped weights know the words by their ids.
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(models["text"]).get_vocab() == train_tokenizer(corpus()).get_vocab()


def test_making_the_models_again_leaves_them_as_they_are(models: dict[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in models["text"].parent.rglob("*") if path.is_file()}
    make_demo_models(models["text"].parent)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_model_that_ranks_pictures_sees_their_colours(models: dict[str, Path]) -> None:
    """The raw_image mode would see no more than the text without them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(models["vision"])
    model = AutoModelForImageTextToText.from_pretrained(models["vision"]).eval()
    prompt = render_messages(processor, load_prompt(None, "caption").messages("", with_image=True))
    wanted = [
        ("Mug", "red", "plain"),
        ("Lamp", "blue", "striped"),
        ("Chair", "green", "plain"),
        ("Vase", "black", "dotted"),
    ]
    pictures = [draw(*look, seed=[5, number]) for number, look in enumerate(wanted * 3)]
    inputs = processor(text=[prompt] * len(pictures), images=pictures, return_tensors="pt")
    with torch.no_grad():
        answers = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    said = [processor.decode(answer, skip_special_tokens=True) for answer in answers]
    right = [colour in text for (_, colour, _), text in zip(wanted * 3, said, strict=True)]
    assert np.mean(right) > 0.8, said


@pytest.fixture(scope="module")
def written(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The demo's shop, and what the captioner writes about it with the demo's settings."""
    folder = tmp_path_factory.mktemp("pictures")
    recipe = read_yaml(config_dir() / "recipes" / "demo.yaml")
    options = {stage["what"]: stage for stage in recipe["stages"] if "generate" in stage}
    products = make_products(N_ITEMS, seed=0)
    texts: dict[What, dict[str, str]] = {}
    for what in get_args(What):
        job = Job(
            load_prompt(None, what),
            model=str(models["captioner"]),
            model_name="captioner",
            max_tokens=options[what]["max_tokens"],
            image_side=options[what]["image_side"],
        )
        rows = []
        for number, product in enumerate(products):
            picture = folder / f"{product.source_id}.png"
            picture.write_bytes(picture_bytes(product, seed=0))
            text = f"{product.title} | {product.brand} | Home > {product.kind}s | {product.description}"
            row = {"item_id": number, "text": text, "picture": str(picture), "picture_hash": "", "input_hash": ""}
            rows.append(row | prepare(row, job))
        answers = TransformersGenerator(job, "float32")({DATA: np.array(rows)})[DATA]
        texts[what] = {p.source_id: row["generated_text"] for p, row in zip(products, answers, strict=True)}
    return products, texts


def test_captions_of_the_shop_are_right(written: Written) -> None:
    """A newcomer looks at the pictures and their captions first: a wrong one says that nothing here works."""
    products, texts = written
    right = caption_accuracy(products, texts["caption"])
    assert right["all three"] >= 0.95, right


def test_summaries_of_the_shop_say_what_is_read_and_what_is_seen(written: Written, pretrain: ModuleType) -> None:
    """They carry style and colour into the summary modes; without them these modes would know half of a taste."""
    products, texts = written
    said = texts["semantic_summary"]
    right = [said[p.source_id] == pretrain.summary(p.style, p.colour, p.kind) for p in products]
    assert np.mean(right) >= 0.95, [text for text, good in zip(said.values(), right, strict=True) if not good]


def test_a_caption_is_right_only_with_all_that_is_seen_and_nothing_else() -> None:
    mug, vase = (
        replace(product, kind=kind, colour="red", pattern=pattern)
        for product, kind, pattern in zip(make_products(2), ("Mug", "Vase"), ("dotted", "plain"), strict=True)
    )

    def right(first: str, second: str) -> list[float]:
        return list(caption_accuracy([mug, vase], {mug.source_id: first, vase.source_id: second}).values())

    assert right("A red dotted mug.", "A red vase.") == [1, 1, 1, 1]
    assert right("A red mug.", "A red striped vase.") == [1, 1, 0, 0]
    assert right("A blue dotted mug.", "A red chair.") == [0.5, 0.5, 1, 0]
    assert right("A red dotted mug, a vase.", "A red or blue vase.") == [0.5, 0.5, 1, 0]
    assert list(caption_accuracy([mug, vase], {vase.source_id: "A red vase."}).values()) == [0.5] * 4


def test_an_installed_vlrank_has_the_weights(tmp_path: Path) -> None:
    """`pip install vlrank` and `vlrank demo` must work without a checkout."""
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(Path(__file__).parents[2])).build(directory=str(tmp_path), versions=["standard"])
    shipped = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "/demo/weights/" in name}
    assert shipped == {"captioner.safetensors", "text.safetensors", "tokenizer.json", "vision.safetensors"}


def test_lessons_name_the_one_line_that_fits(pretrain: ModuleType) -> None:
    """Pre-training must teach to read, so every question has one right answer and its guides point at it."""
    tokenizer = train_tokenizer(corpus())
    lessons = pretrain.Lessons("text", tokenizer, [], batch=1, grow=1, seed=0)
    rng = np.random.default_rng(0)
    for form in ("caption", "semantic_summary", "plain"):
        row = lessons._point(rng, 20, form, [])
        token, read, line = row.answers[0]
        number = tokenizer.decode(
            [i for i in row.labels if i != -100][: 1 + (row.labels[token + 2] != tokenizer.eos_token_id)]
        )
        first = row.gather[[g[0] for g in row.gather].index(line[0])][1]
        assert tokenizer.decode(row.ids[first : line[0]]) == number
        assert all(end > start for start, end in read)


def test_a_picture_becomes_one_visual_token_of_the_rankers_and_nine_of_the_captioner(pretrain: ModuleType) -> None:
    picture = draw("Mug", "red", "plain")
    assert pretrain.picture_patches(picture).shape == (4, 3 * 2 * 16 * 16)
    assert pretrain.picture_patches(picture, pretrain.CAPTIONER_SIDE).shape == (9 * 4, 3 * 2 * 16 * 16)
