"""Templates come from anywhere: each must ask the same question every day, with the answer right behind it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from vlrank.config import GenerateConfig, RerankConfig, TrainConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.generation import pipeline as generate
from vlrank.prompting.chat_template import (
    chat_template,
    check_chat_template,
    check_tokenizer,
    complete_tokenizer,
    render_messages,
)
from vlrank.prompting.labels import LabelTrie, end_token_id
from vlrank.reranking import pipeline as rerank
from vlrank.training import run as train

from .tokenizers_zoo import CHAT, SPACED_CHAT, digits

QUESTION = [{"role": "user", "content": "Which one?"}]
SHOWN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which one?"}]}]
TURN = "<|im_start|>user\nWhich one?<|im_end|>\n<|im_start|>assistant\n"

# After Llama 3.2, Qwen3, Qwen3-Thinking-2507, DeepSeek-R1, LLaVA and gpt-oss.
DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "Today Date: {{ date_string }}\n" + CHAT
)
SWITCHED = CHAT.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
REASONER = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
REFUSING = "{% if enable_thinking is defined %}{{ raise_exception('unknown argument') }}{% endif %}" + CHAT
PARTS = (
    "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content | selectattr('type', 'equalto', 'image') %}"
    "<image>\n{% endfor %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}{% generation %}{{ m.role | tojson }}: "
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    '{% if add_generation_prompt %}"assistant": {% endif %}'
)


def model(template: Any) -> Any:
    return SimpleNamespace(chat_template=template, special_tokens_map={"eos_token": "<|im_end|>"})


@pytest.mark.parametrize("template", [CHAT, SPACED_CHAT, SWITCHED, MARKED])
def test_the_text_is_what_transformers_makes_of_it(template: str) -> None:
    tokenizer = digits(template)
    messages = [{"role": "user", "content": 'Löffel & "Gabel" <b>\n\n 1-20'}]
    ours = render_messages(tokenizer, messages)
    assert ours == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SWITCHED, TURN + "<think>\n\n</think>\n\n"),
        (THINKING, TURN + "<think>\n\n</think>\n\n"),
        (REASONER, TURN + "<think>\n\n</think>\n\n"),
        (REFUSING, TURN),
        (PARTS, "USER: Which one? ASSISTANT:"),
        (CHANNELS, "<|start|>user<|message|>Which one?<|end|><|start|>assistant<|channel|>final<|message|>"),
        ({"tool_use": "no", "default": CHAT}, TURN),
        ([{"name": "default", "template": CHAT}], TURN),
    ],
)
def test_the_answer_follows_right_behind_the_prompt(template: Any, expected: str) -> None:
    """Read inside an open block of thoughts, the probabilities of numbers mean nothing."""
    assert render_messages(model(template), QUESTION) == expected


def test_prompts_do_not_change_from_day_to_day() -> None:
    """A model would be asked another question than it was trained on, and finished rows would differ from new ones."""
    assert render_messages(model(DATED), QUESTION) == "Today Date: 26 Jul 2024\n" + TURN


def test_a_base_model_is_asked_in_plain_text() -> None:
    assert render_messages(model(None), QUESTION) == "Which one?\n\nAnswer:\n"
    with pytest.raises(UserError, match="no chat template, which is needed to show pictures"):
        render_messages(model(None), SHOWN)


def test_labels_and_their_end_are_read_behind_closed_thoughts() -> None:
    tokenizer = digits(THINKING)
    assert end_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert LabelTrie.of(tokenizer, 20).labels[11] == (
        *tokenizer("12", add_special_tokens=False)["input_ids"],
        end_token_id(tokenizer),
    )


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.role }}", "not valid Jinja"),
        ("hello", "leaves the question out"),
        ({"rag": CHAT}, "several chat templates and none is the default: rag"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_message(template: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        chat_template(model(template))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UserError, match=rf"model {tmp_path} cannot be used: .*{problem}"):
        check_chat_template(tmp_path, pictures=False)


@pytest.mark.parametrize(
    ("files", "pictures", "problem"),
    [
        ({"tokenizer_config.json": {}}, True, "no chat template, which is needed to show pictures"),
        (
            {"tokenizer_config.json": {"chat_template": CHAT.replace("m.content", "m.content + ''")}},
            True,
            "cannot show",
        ),
        ({"chat_template.json": {"chat_template": PARTS.replace("<image>\n", "")}}, True, "leaves pictures out"),
        ({"chat_template.json": {"chat_template": PARTS}}, True, None),
        ({"processor_config.json": {"chat_template": PARTS}}, True, None),
        ({"tokenizer_config.json": {"chat_template": CHAT, "eos_token": {"content": "</s>"}}}, False, None),
    ],
)
def test_models_are_looked_at_before_they_are_loaded(
    tmp_path: Path, files: dict[str, Any], pictures: bool, problem: str | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if problem is None:
        assert check_chat_template(str(tmp_path), pictures=pictures) is None
        return
    with pytest.raises(UserError, match=problem) as error:
        check_chat_template(tmp_path, pictures=pictures)
    assert "chat_template.jinja" in str(error.value.remedy)


def test_a_model_without_a_template_is_mentioned(tmp_path: Path) -> None:
    assert "plain text" in str(check_chat_template(tmp_path, pictures=False))
    assert check_chat_template("somebody/on-the-hub", pictures=True) is None


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_a_template_in_the_processors_files_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": PARTS}))
    tokenizer = complete_tokenizer(model(None), tmp_path)
    assert render_messages(tokenizer, SHOWN) == "USER: <image>\nWhich one? ASSISTANT:"
    own = complete_tokenizer(model(CHAT), tmp_path)
    assert own.chat_template == CHAT


def test_every_stage_says_so_before_anything_starts(shop: Dataset, tiny_vision_model: Path, tmp_path: Path) -> None:
    """Training started its worker three times for the same error, and every generated row failed."""
    base = tmp_path / "base"
    shutil.copytree(tiny_vision_model, base, ignore=shutil.ignore_patterns("chat_template*"))
    common = {"dataset": shop.path, "model": str(base), "out": tmp_path / "out.parquet"}
    stages = (
        lambda: train.run(load_config(TrainConfig, mode="raw_image", **common)),
        lambda: rerank.run(load_config(RerankConfig, as_mode="raw_image", **common)),
        lambda: generate.run(load_config(GenerateConfig, dataset=shop.path, what="caption", model=str(base))),
    )
    for run in stages:
        with pytest.raises(UserError, match="no chat template, which is needed to show pictures"):
            run()
        assert not ray.is_initialized()
    assert not list(tmp_path.glob("out.parquet*"))


def test_a_tokenizer_from_the_hub_is_checked_when_it_has_been_loaded() -> None:
    assert check_tokenizer(model(PARTS), "somebody/vision", pictures=True) is None
    assert "plain text" in str(check_tokenizer(model(None), "somebody/base", pictures=False))
    with pytest.raises(UserError, match="somebody/base cannot be used: it has no chat template"):
        check_tokenizer(model(None), "somebody/base", pictures=True)
