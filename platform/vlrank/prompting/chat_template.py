"""The chat template: from messages to the text that a model reads, for generation, training and ranking alike.

Templates are Jinja programs that come with a model. They are rendered here as transformers does it, with two
differences: the date stands still, because prompts may not change from one day to the next, and a block of thoughts
that the template opens is closed, because the answer is read right behind the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlrank.data.tables import read_json
from vlrank.errors import UserError
from vlrank.storage import Location, location

Messages = list[dict[str, Any]]

TODAY = datetime(2024, 7, 26)
"""The date that templates see."""

_QUESTION, _ANSWER = "Which number comes next?", "42"
"""Probes: rendering them shows how a template takes messages and what it writes around an answer."""
_OPEN_THOUGHTS = re.compile(r"<([\w:|]*think\w*\|?)>\s*\Z")


@dataclass(frozen=True)
class ChatTemplate:
    """A model's template, and the form of messages that it takes.

    Attributes:
        template: Compiled.
        variables: Special tokens, and ``enable_thinking`` unless the template refuses it.
        parts: Text has to come as a list of parts; most templates take a string.
        before_answer: What stands between the generation prompt and an answer: the end of a block of thoughts.
        after_answer: What follows an answer.
    """

    template: jinja2.Template
    variables: Mapping[str, Any]
    parts: bool = False
    before_answer: str = ""
    after_answer: str = ""

    def render(self, messages: Messages) -> str:
        """Messages as text, ending where the answer begins."""
        return self._text(messages, generation=True) + self.before_answer

    def _text(self, messages: Messages, *, generation: bool) -> str:
        if self.parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message["content"], str)
                else message
                for message in messages
            ]
        return self.template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=generation, **self.variables
        )


def chat_template(tokenizer: Any) -> ChatTemplate | None:
    """The template of a tokenizer or processor; None where a base model has none.

    Raises:
        UserError: the template cannot be used.
    """
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        return None
    tokens = getattr(tokenizer, "tokenizer", tokenizer).special_tokens_map
    return _probed(_default(source), tuple((name, token) for name, token in tokens.items() if isinstance(token, str)))


def render_messages(tokenizer: Any, messages: Messages) -> str:
    """Chat messages as text, ending where the answer begins. Base models without a chat template get the plain text.

    Args:
        tokenizer: A tokenizer or processor; image parts become the template's image placeholders.
        messages: ``role`` and ``content``: a string, or parts of the types ``text`` and ``image``.

    Raises:
        UserError: the template cannot be used, or there is none to place pictures with.
    """
    template = chat_template(tokenizer)
    if template is not None:
        try:
            return template.render(messages)
        except Exception as error:  # templates raise whatever their authors wrote
            raise UserError(f"the model's chat template fails: {_reason(error)}", _INSTRUCT) from error
    if any(not isinstance(message["content"], str) for message in messages):
        raise UserError("the model has no chat template, which is needed to show pictures", _INSTRUCT)
    return "\n\n".join(message["content"] for message in messages) + "\n\nAnswer:\n"


def complete_tokenizer(tokenizer: Any, model: str | Location, revision: str | None = None) -> Any:
    """The tokenizer of ``model``, with the template that older models keep in a file of their processor."""
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = _of_processor(model, revision)
    return tokenizer


def check_tokenizer(tokenizer: Any, model: str | Location, *, pictures: bool) -> str | None:
    """Find out whether prompts can be made with a tokenizer.

    Args:
        tokenizer: The model's.
        model: How messages call the model.
        pictures: Whether prompts show pictures.

    Returns:
        What the user should know, if anything.

    Raises:
        UserError: prompts cannot be made.
    """
    with _named(model):
        return _check(chat_template(tokenizer), model, pictures)


def check_chat_template(model: str | Location, *, pictures: bool) -> str | None:
    """`check_tokenizer` from the files of a model folder, before anything is loaded.

    A Hugging Face name is not checked: its files may not be here yet.
    """
    folder = location(model)
    if not folder.is_dir():
        return None
    config, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    with _named(model):
        settings = read_json(config) if config.is_file() else {}
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        source = source or _of_processor(model)
        named = ((name, token.get("content") if isinstance(token, dict) else token) for name, token in settings.items())
        tokens = tuple((name, token) for name, token in named if name.endswith("_token") and isinstance(token, str))
        return _check(_probed(_default(source), tokens) if source else None, model, pictures)


_INSTRUCT = "Use the model's instruction-tuned variant, or copy its chat_template.jinja into the folder."


def _check(template: ChatTemplate | None, model: str | Location, pictures: bool) -> str | None:
    if template is not None and pictures:
        _check_pictures(template)
    if template is None and pictures:
        raise UserError("it has no chat template, which is needed to show pictures")
    return f"{model} has no chat template: prompts are plain text that ends in 'Answer:'" if template is None else None


@contextmanager
def _named(model: str | Location) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"model {model} cannot be used: {error.problem}", error.remedy or _INSTRUCT) from None


def _check_pictures(template: ChatTemplate) -> None:
    text = {"type": "text", "text": _QUESTION}
    try:
        shown, bare = (
            template.render([{"role": "user", "content": [*images, text]}]) for images in ([{"type": "image"}], [])
        )
    except Exception as error:
        raise UserError(f"its chat template cannot show pictures: {_reason(error)}") from error
    if shown == bare or _QUESTION not in shown:
        raise UserError("its chat template leaves pictures out")


@lru_cache(maxsize=16)
def _probed(source: str, tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    try:
        compiled = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"its chat template is not valid Jinja: {_reason(error)}") from error
    question = {"role": "user", "content": _QUESTION}
    failure = "it leaves the question out"
    for options in ({"enable_thinking": False}, {}):
        for parts in (False, True):
            template = ChatTemplate(compiled, {**dict(tokens), **options}, parts)
            try:
                prompt = template.render([question])
            except Exception as error:  # templates raise whatever their authors wrote
                failure = _reason(error)
                continue
            if _QUESTION in prompt:
                return _answered(template, question, prompt)
    raise UserError(f"its chat template fails: {failure}")


def _answered(template: ChatTemplate, question: dict[str, Any], prompt: str) -> ChatTemplate:
    """The template with what it writes before and after an answer."""
    try:
        turn = template._text([question, {"role": "assistant", "content": _ANSWER}], generation=False)
    except Exception:  # made for one question
        turn = ""
    written, answer, after = turn.rpartition(_ANSWER)
    before = written.removeprefix(prompt) if answer and written.startswith(prompt) else ""
    if not before.strip():
        # A template with no such turn, or one that shows no thoughts in it.
        thoughts = _OPEN_THOUGHTS.search(prompt)
        line = "" if prompt.endswith("\n") else "\n"
        before = f"{line}\n</{thoughts.group(1)}>\n\n" if thoughts else ""
    return ChatTemplate(template.template, template.variables, template.parts, before, after)


def _default(source: Any) -> str:
    """The template to use where a model has several: a mapping of names, or a list as tokenizer_config.json has it."""
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    if not isinstance(source, Mapping):
        return str(source)
    if "default" not in source:
        raise UserError(f"it has several chat templates and none is the default: {', '.join(sorted(source))}")
    return str(source["default"])


def _of_processor(model: str | Location, revision: str | None = None) -> str | None:
    folder = location(model)
    for name in ("chat_template.json", "processor_config.json"):
        file = folder / name if folder.is_dir() else _hub_file(str(model), name, revision)
        if file is not None and file.is_file() and (source := read_json(file).get("chat_template")):
            return _default(source)
    return None


def _hub_file(model: str, name: str, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    path = cached_file(
        model,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


class _Generation(Extension):
    """``{% generation %}``, with which some templates mark what the model has written; it prints its content."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """What templates may use: as in transformers.utils.chat_template_utils, but for the date."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    return environment


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
