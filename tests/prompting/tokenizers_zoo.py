"""Small tokenizers that write numbers in different ways."""

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED_CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [f"user: Answer with only one number (1-{n}).\nassistant: {n}" for n in range(1, 101)] * 20


def _wrap(tokenizer: Tokenizer, chat: str | None) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        pad_token="<|endoftext|>",
    )
    fast.chat_template = chat
    return fast


def digits(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Like Qwen: bytes and single digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer, chat)


def multi_digit(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Like GPT-2: byte BPE whose merges reach over digits, so that "12" or "100" may be one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer, chat)


def leading_space() -> PreTrainedTokenizerFast:
    """A template that ends in a space, which the tokenizer joins with the number: " 12" is one token."""
    return multi_digit(SPACED_CHAT)


def plain() -> PreTrainedTokenizerFast:
    """A base model's tokenizer, without a chat template."""
    return multi_digit(None)


ZOO: dict[str, Callable[[], Any]] = {
    "digits": digits,
    "multi_digit": multi_digit,
    "leading_space": leading_space,
    "plain": plain,
}
