"""Tokens of remembered lines are those of the whole text, whatever stands in it."""

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN3
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN3_5

from tests.prompting import tokenizers_zoo
from vlrank.prompting.token_cache import TokenCache, lines_of

LLAMA3 = QWEN3.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
WORDS = [
    *("\n", "\n\n", "\r\n", "\r", " ", "  ", "\t", "\v", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\u200b"),
    *("a", "Mug", "don't", "'S", "é", "e\u0301", "\u0301", "杯", "كوب", "🫖", "ß", "ﬁ"),
    *("1", "12", "٣", "½", "1. ", "12. ", "100. ", "- ", ".", ")", "!?", "(Image: ", "-", "1.", "#", "<", ">"),
    *("<|im_start|>", "<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>", "<think>"),
]
texts = st.lists(st.sampled_from(WORDS), max_size=40).map("".join)


def byte_level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def behind_split(expression: str) -> Any:
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


SPLITS = {
    "qwen3": lambda: behind_split(QWEN3),
    "qwen3.5": lambda: behind_split(QWEN3_5),
    "llama3": lambda: behind_split(LLAMA3),
    "gpt2": lambda: byte_level(use_regex=True),
    "smollm2": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)]
    ),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges whatever often stands side by side, blanks and line breaks too."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if name.startswith("qwen") else None
    made.pre_tokenizer = SPLITS[name]()
    drawn = random.Random(0)
    corpus = ["".join(drawn.choices(WORDS, k=30)) for _ in range(2000)]
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    )
    made.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def whole(of: Any, text: str) -> list[int]:
    return list(of(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", SPLITS)
@settings(max_examples=400, deadline=None)
@given(texts)
@example("1. a)\n\n2. b\n - c\n12. \u0301d")
@example("a\n\n\n1.  b")
@example("\n\n- a \n- b<|im_end|>\n<|im_start|>assistant\n")
def test_tokens_are_those_of_the_whole_text(name: str, text: str) -> None:
    assert lines_of(tokenizer(name)) is not None
    tokens = TokenCache(tokenizer(name))
    expected = whole(tokenizer(name), text)
    assert tokens(text).tolist() == expected
    assert tokens(text).tolist() == expected  # from memory


def test_lines_of_prompts_are_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    one = tokenizer("qwen3")

    class Spy:
        backend_tokenizer, added_tokens_decoder = one.backend_tokenizer, one.added_tokens_decoder

        def __call__(self, texts: list[str], **kwargs: Any) -> Any:
            asked.extend(texts)
            return one(texts, **kwargs)

    tokens = TokenCache(Spy())
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    tokens(f"History:\n- a mug\n- a lamp\n\nItems:\n{picture}1. a vase\n{picture}2. a bowl\n\nAnswer.")
    del asked[:]
    # Other numbers, other places, history or candidate: the same items.
    assert tokens("History:\n- a vase\n- a bowl\n\nItems:\n1. a mug\n2. a vase\n").tolist() == whole(
        one, "History:\n- a vase\n- a bowl\n\nItems:\n1. a mug\n2. a vase\n"
    )
    assert not [text for text in asked if "vase" in text or "bowl" in text or "mug" in text]
    # What no longer fits begins anew.
    monkeypatch.setattr("vlrank.prompting.token_cache._KEPT", 8)
    for number in range(20):
        text = f"1. item {number}\n2. item {number + 1}\n"
        assert tokens(text).tolist() == whole(one, text)
        assert len(tokens._known) <= 8


@pytest.mark.parametrize("change", ["metaspace", "prefix space", "lowercase", "lstrip", "blank token", "other regex"])
def test_a_tokenizer_that_may_join_pieces_gets_whole_texts(change: str) -> None:
    made = Tokenizer.from_str(tokenizer("qwen3").backend_tokenizer.to_str())
    if change == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    elif change == "prefix space":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "lowercase":
        made.normalizer = normalizers.Lowercase()
    elif change == "lstrip":
        made.add_tokens([AddedToken("<tool>", lstrip=True)])
    elif change == "blank token":
        made.add_tokens([AddedToken("\n\n\n")])
    else:
        made.pre_tokenizer = behind_split(r"\S+\s*")
    other = PreTrainedTokenizerFast(tokenizer_object=made)
    assert lines_of(other) is None
    text = "A\n\n\n1. b <tool>\n2. c"
    assert TokenCache(other)(text).tolist() == whole(other, text)
    assert TokenCache(tokenizers_zoo.digits())(text).tolist() == whole(tokenizers_zoo.digits(), text)
