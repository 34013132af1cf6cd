"""A wrong label trie ranks candidates by something else than the model's answer; nobody would notice."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlrank.errors import UserError
from vlrank.prompting.chat_template import render_messages
from vlrank.prompting.labels import LabelTrie, Node, end_token_id

from .tokenizers_zoo import ZOO


@cache
def tokenizer_of(name: str) -> Any:
    return ZOO[name]()


END = 2


def test_twenty_single_digit_labels_have_three_choices() -> None:
    # Labels "1".."20", digit d is token 10 + d: choices at the root, after "1" (end, 0..9) and after "2" (end, 0).
    trie = LabelTrie(tuple((*(10 + int(d) for d in str(i)), END) for i in range(1, 21)))
    assert trie.nodes == (
        Node((), tuple(range(11, 20))),
        Node((11,), (END, *range(10, 20))),
        Node((12,), (END, 10)),
    )
    assert trie.tree.tokens == (11, 12)
    assert trie.tree.parents == (-1, -1)
    assert trie.tree.node_at == (-1, 0, 1)


def test_a_uniform_model_gives_the_closed_form() -> None:
    trie = LabelTrie(tuple((*(10 + int(d) for d in str(i)), END) for i in range(1, 21)))
    p = np.exp(trie.log_probs(np.zeros(len(trie.flat))))
    assert p[2] == pytest.approx(1 / 9)  # "3": one of nine first digits, then nothing else is valid
    assert p[0] == pytest.approx(1 / 9 * 1 / 11)  # "1" and then the end, of eleven continuations
    assert p[19] == pytest.approx(1 / 9 * 1 / 2)  # "20"
    assert p.sum() == pytest.approx(1)


@settings(max_examples=60)
@given(n=st.integers(1, 100), name=st.sampled_from(sorted(ZOO)), seed=st.integers(0, 2**32 - 1))
def test_equals_brute_force_over_a_made_up_language_model(n: int, name: str, seed: int) -> None:
    """Brute force: every label as a full continuation, each step normalised over what may still become a label."""
    trie = LabelTrie.of(tokenizer_of(name), n)
    table: dict[tuple[int, ...], np.ndarray] = {}

    def logits(path: tuple[int, ...]) -> np.ndarray:
        return table.setdefault(path, np.random.default_rng([seed, *path]).normal(0, 4, size=600))

    expected = []
    for label in trie.labels:
        total = 0.0
        for depth, token in enumerate(label):
            valid = sorted({other[depth] for other in trie.labels if other[:depth] == label[:depth]})
            here = logits(label[:depth])[valid].astype(np.float64)
            total += logits(label[:depth])[token] - np.log(np.exp(here - here.max()).sum()) - here.max()
        expected.append(total)
    flat = [logits(trie.nodes[i].path)[token] for i, token in trie.flat]
    got = trie.log_probs(flat)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.exp(got.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


@given(st.integers(2, 120), st.sampled_from(sorted(ZOO)), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_prompts_read_together_have_the_scores_of_each_alone_to_the_last_bit(
    n: int, name: str, prompts: int, seed: int
) -> None:
    trie = LabelTrie.of(tokenizer_of(name), n)
    logits = np.random.default_rng(seed).normal(0, 5, (prompts, len(trie.flat)))
    np.testing.assert_array_equal(trie.log_probs(logits), [trie.log_probs(row) for row in logits])


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("n", [1, 5, 9, 10, 20, 99, 100])
def test_labels_are_what_follows_the_prompt_in_the_whole_text(name: str, n: int) -> None:
    tokenizer = tokenizer_of(name)
    trie = LabelTrie.of(tokenizer, n)
    text = render_messages(tokenizer, [{"role": "user", "content": "Mug, red.\n\nAnswer with only one number (1-9)."}])
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = prompt[: len(prompt) - trie.drop]
    for number, label in enumerate(trie.labels, start=1):
        whole = tokenizer(f"{text}{number}", add_special_tokens=False)["input_ids"]
        assert [*prompt, *label[:-1]] == whole
        assert label[-1] == end_token_id(tokenizer)


def test_the_zoo_really_has_multi_digit_tokens_and_joined_spaces() -> None:
    assert all(len(label) == 2 for label in LabelTrie.of(tokenizer_of("leading_space"), 9).labels)
    assert LabelTrie.of(tokenizer_of("leading_space"), 9).drop == 1
    assert len(LabelTrie.of(tokenizer_of("digits"), 12).labels[11]) == 3
    assert len(LabelTrie.of(tokenizer_of("multi_digit"), 12).labels[11]) == 2


def test_the_end_token_is_what_the_chat_template_writes() -> None:
    chat = tokenizer_of("digits")
    assert end_token_id(chat) == chat.convert_tokens_to_ids("<|im_end|>")
    base = tokenizer_of("plain")
    assert end_token_id(base) == base.eos_token_id


def test_a_tokenizer_that_cannot_tell_numbers_apart_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Answer": 2, "1": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(UserError, match="cannot tell the answers 1 to 3 apart"):
        LabelTrie.of(tokenizer, 3)


def test_labels_without_an_end_token_are_refused() -> None:
    with pytest.raises(ValueError, match="end token"):
        LabelTrie(((1,), (1, 0)))


def test_qwen_digits(shared_models: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shared_models / "tokenizer.json"), eos_token="<|im_end|>")
    trie = LabelTrie.of(tokenizer, 20)
    assert [node.path for node in trie.nodes] == [(), (16,), (17,)]  # '0'..'9' are ids 15..24
    assert trie.labels[11][:2] == (16, 17)
