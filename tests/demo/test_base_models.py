"""The tiny models must be complete: transformers, PEFT, Unsloth and vLLM load them like real ones."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vlrank.demo.base_models import corpus, make_demo_models, train_tokenizer
from vlrank.demo.shop import draw
from vlrank.generation.prompts import load_prompt
from vlrank.prompting.chat_template import render_messages


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


def test_the_vision_model_says_what_it_sees(models: dict[str, Path]) -> None:
    """Its captions carry the colour into the caption mode; without them that mode would see no more than the text."""
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


def test_a_picture_becomes_one_visual_token(pretrain: ModuleType) -> None:
    assert pretrain.picture_patches(draw("Mug", "red", "plain")).shape == (4, 3 * 2 * 16 * 16)
