"""Tiny Qwen3 and Qwen3-VL models, made from their configs, for the demo and for tests.

They are complete Hugging Face folders (config, safetensors, tokenizer with Qwen's special tokens and digits, chat
template, image processor) that transformers, PEFT, Unsloth and vLLM load like real ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlrank.compat import patch_torchvision
from vlrank.data.tables import atomic_write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""
"""ChatML as Qwen writes it, without tools and thinking."""

# Qwen's pre-tokenisation: words with their leading space, digits one by one, punctuation, line breaks.
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PATCH, MERGE = 16, 2
CELL = PATCH * MERGE
"""Pixels along one side of what becomes one visual token."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's pre-tokenisation and special tokens; digits are single tokens.

    Args:
        texts: What it is trained on; any other text can be encoded too, in smaller pieces.
        vocab_size: Entries, special tokens included; fewer when the texts do not hold that many.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return _dressed(core)


def _dressed(core: Tokenizer) -> PreTrainedTokenizerFast:
    """A bare tokenizer with Qwen's special tokens and the chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    # What Qwen-VL's processor asks its tokenizer for.
    tokenizer.init_kwargs.update(image_token="<|image_pad|>", video_token="<|video_pad|>")
    return tokenizer


def _text_sizes(hidden: int, layers: int, heads: int, head_dim: int, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }


def text_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 32,
    seed: int = 0,
) -> PreTrainedModel:
    """A `Qwen3ForCausalLM` with random weights, float32. vLLM on a CPU needs ``head_dim`` of at least 32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **_text_sizes(hidden, layers, heads, head_dim, len(tokenizer)),
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **_token_ids(tokenizer),
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).float()


def vision_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 32,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    seed: int = 0,
) -> PreTrainedModel:
    """A `Qwen3VLForConditionalGeneration` with random weights, float32; with deepstack and interleaved mrope."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    third = head_dim // 6
    config = Qwen3VLConfig(
        text_config={
            **_text_sizes(hidden, layers, heads, head_dim, len(tokenizer)),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_interleaved": True,
                "mrope_section": [head_dim // 2 - 2 * third, third, third],
            },
            **_token_ids(tokenizer),
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,  # a square
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.05,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return Qwen3VLForConditionalGeneration(config).float()


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def save_model(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, image_pixels: int = CELL * CELL
) -> Path:
    """Write a model folder; a vision model gets its image processor, which scales pictures to ``image_pixels``."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if model.config.model_type == "qwen3_vl":
        patch_torchvision()
        from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

        processor = Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(**picture_options(image_pixels)),
            tokenizer=AutoTokenizer.from_pretrained(path),
            # vLLM measures videos even where none is allowed, and divides by zero when a frame is smaller than a token.
            video_processor=Qwen3VLVideoProcessor(**picture_options(8 * image_pixels)),
            chat_template=CHAT_TEMPLATE,
        )
        processor.save_pretrained(path)
    # Greedy decoding that stops where an answer ends, as the published models' folders say it.
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    atomic_write_json(path / "generation_config.json", ids)
    return path


def picture_options(longest_edge: int) -> dict[str, Any]:
    """Options of the models' image processor; ``longest_edge`` is its bound on the pixels of a picture."""
    return {
        "size": {"shortest_edge": CELL * CELL, "longest_edge": longest_edge},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


DEMO_SIZES = {"hidden": 64, "layers": 3, "heads": 4}
"""Shape of the demo's two base models for ranking, as their weights have it."""
CAPTIONER_SIZES = {"hidden": 64, "layers": 2, "heads": 4, "vision_layers": 3}
"""Shape of the demo's captioner."""
CAPTIONER_SIDE = 3 * CELL
"""Pixels along one side of the captioner's pictures: in one visual token, stripes and handles are blurred."""
WEIGHTS = Path(__file__).parent / "weights"


def make_demo_models(folder: Path) -> dict[str, Path]:
    """The demo's models, with the weights that bench/pretrain.py made.

    ``text`` and ``vision`` are the base models of the rerankers; ``captioner`` writes captions and summaries. A model
    this small learns either to see well or to read lists well.

    Returns:
        Name -> model folder; an existing one is left as it is.
    """
    from safetensors.torch import load_file

    tokenizer = demo_tokenizer()
    builds = {
        "text": lambda: text_model(tokenizer, **DEMO_SIZES),
        "vision": lambda: vision_model(tokenizer, **DEMO_SIZES),
        "captioner": lambda: vision_model(tokenizer, **CAPTIONER_SIZES),
    }
    for name, build in builds.items():
        if (folder / name / "generation_config.json").exists():  # written last
            continue
        model = build()
        state = {key: value.float() for key, value in load_file(WEIGHTS / f"{name}.safetensors").items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"{name}.safetensors does not fit its config: {missing[:3]} {unexpected[:3]}")
        model.tie_weights()
        side = CAPTIONER_SIDE if name == "captioner" else CELL
        save_model(folder / name, model, tokenizer, image_pixels=side * side)
    return {name: folder / name for name in builds}


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all three models, from its file."""
    from tokenizers import Tokenizer

    return _dressed(Tokenizer.from_file(str(WEIGHTS / "tokenizer.json")))


def corpus() -> list[str]:
    """Texts with every word of the shop and of the prompts, for `train_tokenizer`."""
    from vlrank.demo.shop import COLOURS, PATTERNS, make_products
    from vlrank.generation.prompts import load_prompt
    from vlrank.prompting.modes import mode_spec
    from vlrank.prompting.prompts import build_prompt

    texts = [load_prompt(None, what).question("") for what in ("caption", "semantic_summary")]
    for product in make_products(200, seed=0):
        line = f"{product.title} | {product.brand} | Home > {product.kind}s | {product.description}"
        texts += [line, f"- {line}\n"]
        texts += [f"A {colour} {pattern} {product.kind.lower()}." for colour in COLOURS for pattern in PATTERNS]
        texts += [f"A {product.style} {product.kind.lower()} in {colour}." for colour in COLOURS]
    for what in ("caption", "semantic_summary"):
        item = {"text": "Mug", what: "A mug."}
        texts += [build_prompt(mode_spec(what), [item], [item] * 20).messages[0]["content"]] * 20  # type: ignore[list-item]
    return texts
