"""What a run takes of a GPU's memory, and what is given up to fit it, in the order of what that costs.

Arithmetic alone: no GPU is needed to plan for one. Per token, each decoder layer keeps what its backward pass reads.
With h, q, k and f for the widths of hidden state, queries, keys (or values) and MLP, a compiled layer (or Unsloth's)
keeps 8h + 6q + 6k + 6f bytes in bfloat16: two residuals and two normed inputs; queries before and after rotation and
the output of attention; keys twice and values; gate, up and their product. Run operation by operation it keeps
16h + 12q + 12k + 8f: norms work in float32. On an H100, 16,384 tokens of Qwen3-0.6B take 20 GiB
compiled; the formula says 19.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vlrank.engines.resources import GIB
from vlrank.engines.structure import core
from vlrank.errors import UserError

if TYPE_CHECKING:
    from vlrank.config import TrainConfig
    from vlrank.training.model import Base

_CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
_USABLE = 0.92
"""Of the memory that is free; the rest is left to fragments."""
_WORKSPACE = 0.4 * GIB
"""Of matrix products, kernels and the loader's batches."""
_MOST_TOKENS = 65536
_ANSWER_TOKENS = 3

Optimizer = Literal["adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit"]
_STATE_BYTES: dict[str, int] = {"adamw_bf16": 4, "adamw_8bit": 2, "paged_adamw_8bit": 0}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes.

    Attributes:
        layers, hidden, query, key, inner, vocabulary: Of the language model; ``inner`` is the MLP's width.
        weight_bytes: Of all weights as they are loaded.
        trained: Numbers that learn, and ``trained_bytes`` of them.
        largest_trained: Bytes of the largest weight that learns.
        embedded: Trained numbers of embeddings, whose moments stay in 32 bits in an 8-bit optimizer.
    """

    layers: int
    hidden: int
    query: int
    key: int
    inner: int
    vocabulary: int
    weight_bytes: float
    trained: int
    trained_bytes: int
    largest_trained: int
    embedded: int = 0

    def token_bytes(self, fused: bool) -> int:
        """Bytes that one layer keeps per token for its backward pass, in bfloat16."""
        if fused:
            return 8 * self.hidden + 6 * self.query + 6 * self.key + 6 * self.inner
        return 16 * self.hidden + 12 * self.query + 12 * self.key + 8 * self.inner


@dataclass(frozen=True, slots=True)
class Work:
    """What a run asks of one GPU.

    Attributes:
        shape: The model.
        longest: Tokens of the longest prompt with its answer: every plan leaves room for one.
        prompts: Of one step on this GPU.
        fused: Layers are compiled, or Unsloth's.
        item_bytes: Of an activation.
        whole_loss: All tokens are learned, not the answer's alone.
        tower: A vision tower is trained too: it keeps about as much again.
        offloads: Recomputed layers keep their inputs in the host's memory (Unsloth).
        ranks: GPUs over which the weights are sharded.
        rows_per_prompt: That validation reads for one prompt.
        optim: Wanted, or None: any, the first that fits.
        recompute: Wanted, or None.
        tokens: Of a pass, or None.
        eight_bit: Whether 8-bit optimizer states are at hand.
    """

    shape: Shape
    longest: int
    prompts: int
    fused: bool
    item_bytes: int = 2
    whole_loss: bool = False
    tower: bool = False
    offloads: bool = False
    ranks: int = 1
    rows_per_prompt: int = 1
    optim: Optimizer | None = None
    recompute: bool | None = None
    tokens: int | None = None
    eight_bit: bool = True

    def settled(self, optim: str) -> float:
        """Bytes of weights, gradients and optimizer states between two passes."""
        shape = self.shape
        # AdamW: two float32 moments, and a float32 copy of weights that are stored in less.
        adamw = 12 if shape.trained_bytes < 4 * shape.trained else 8
        state = _STATE_BYTES.get(optim, adamw) * shape.trained
        if optim == "adamw_8bit":
            state += (8 - _STATE_BYTES[optim]) * shape.embedded
        return (shape.weight_bytes + shape.trained_bytes + state) / self.ranks + _WORKSPACE

    def of_a_token(self, recompute: bool) -> float:
        """Bytes that a pass keeps for each token it reads."""
        shape = self.shape
        layer = shape.token_bytes(self.fused) * self.item_bytes / 2
        kept = shape.layers * layer
        if recompute:  # inputs of all layers, and one layer with its gradients
            kept = (0 if self.offloads else shape.layers * shape.hidden * self.item_bytes) + 2 * layer
        logits = shape.vocabulary * (8 + 2 * self.item_bytes) if self.whole_loss else 0
        return kept * (2 if self.tower else 1) + logits

    def peak(self, tokens: int, recompute: bool, optim: str) -> float:
        """Bytes that training passes over ``tokens`` tokens take at most."""
        shape = self.shape
        answers = 0 if self.whole_loss else _ANSWER_TOKENS * self.prompts * shape.vocabulary * (8 + 2 * self.item_bytes)
        # Tied embeddings get two gradients, which are added up; sharded layers are gathered one after the other.
        gathered = 2 * shape.weight_bytes / shape.layers if self.ranks > 1 else 0
        extra = (shape.largest_trained if shape.trained_bytes > GIB else 0) + gathered
        return self.settled(optim) + tokens * self.of_a_token(recompute) + answers + extra

    def reading(self, tokens: int, optim: str) -> float:
        """Bytes that a validation pass over ``tokens`` padded tokens takes: no gradients, one layer at a time."""
        one = 3 * (self.shape.hidden + self.shape.inner) * self.item_bytes * self.rows_per_prompt
        return self.settled(optim) - self.shape.trained_bytes / self.ranks + tokens * one

    def read_tokens(self, budget: float, optim: str) -> int:
        """Padded tokens of prompts that a validation pass may read."""
        free = budget - self.reading(0, optim)
        fitting = free / (self.reading(1, optim) - self.reading(0, optim))
        return int(max(self.longest, min(32768 // self.rows_per_prompt, fitting)))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a run fits a GPU.

    Attributes:
        tokens: That a pass reads at most, padding included.
        recompute: Layers are recomputed in the backward pass (gradient checkpointing).
        optim: As in `TrainConfig`, decided.
        read_tokens: Of a validation pass.
        peak: Predicted bytes.
        memory: Bytes that it was made for; infinite on a CPU.
        hidden: Width of the model's hidden state.
        keeps_gathered: Sharded weights that a forward pass has gathered are kept for its backward pass.
    """

    tokens: int
    recompute: bool
    optim: Optimizer
    read_tokens: int
    peak: float
    memory: float
    hidden: int = 0
    keeps_gathered: bool = False

    def __str__(self) -> str:
        given = {"adamw_8bit": ", 8-bit optimizer states", "paged_adamw_8bit": ", paged 8-bit optimizer states"}
        return (
            f"passes of up to {self.tokens:,} tokens{', layers recomputed' if self.recompute else ''}"
            f"{given.get(self.optim, '')}; {self.peak / GIB:.1f} of {self.memory / GIB:.1f} GiB"
        )


class TooLarge(UserError):
    """No plan fits the GPU."""


def make_plan(work: Work, memory: float) -> MemoryPlan:
    """The first way to fit a run: shorter passes, then recomputed layers, then 8-bit optimizer states, then paged ones.

    The global batch stays, and so do the learned numbers; 8-bit states change them a little. A pass takes at most half
    of what is free beside weights and optimizer, as long as this holds the longest prompt: more would not be faster.

    Args:
        work: The run.
        memory: Bytes that are free for it.

    Raises:
        TooLarge: nothing fits.
    """
    budget = memory * _USABLE
    ways = list(_ways(work))
    for recompute, optim in ways:
        least = work.tokens or work.longest
        if work.peak(least, recompute, optim) > budget:
            continue
        spare = budget - work.peak(0, recompute, optim)
        half = min(_MOST_TOKENS, spare / 2 / work.of_a_token(recompute))
        tokens = work.tokens or max(work.longest, min(int(half), work.prompts * work.longest))
        read_tokens = work.read_tokens(budget, optim)
        peak = max(work.peak(tokens, recompute, optim), work.reading(read_tokens, optim))
        return MemoryPlan(tokens, recompute, optim, read_tokens, peak, memory, work.shape.hidden)
    needed = min(work.peak(work.tokens or work.longest, *way) for way in ways) / _USABLE / GIB
    card = next((size for size in _CARDS if 0.97 * size >= needed), None)
    smallest = f"the smallest card that could is one of {card} GiB" if card else "no single card could"
    raise TooLarge(
        f"this run needs {needed:.1f} GiB of GPU memory, {memory / GIB:.1f} GiB are free; {smallest}",
        f"Train with {'method: lora, ' if work.shape.trained_bytes > GIB else ''}shorter prompts "
        "(ranking.max_prompt_tokens, ranking.max_history) or a smaller model.",
    )


def _ways(work: Work) -> Iterator[tuple[bool, Optimizer]]:
    """Recomputation and optimizer, from the fastest and most exact to what takes least memory."""
    optims: list[Optimizer] = ["adamw", "adamw_8bit", "paged_adamw_8bit"] if work.eight_bit else ["adamw"]
    if work.optim is not None:
        optims = [work.optim]
    if not work.recompute:
        yield False, optims[0]
    if work.recompute is False:
        yield from ((False, optim) for optim in optims[1:])
    else:
        yield from ((True, optim) for optim in optims)


# ---- models ---------------------------------------------------------------------------------------------------------


def shape_of(model: Any, *, in_4bit: bool = False, item_bytes: int | None = None) -> Shape:
    """Sizes of a model, loaded or on the meta device.

    Args:
        model: Frozen and adapted as it will be trained.
        in_4bit: Count the frozen matrices of linear layers as NF4: half a byte per number, and its scales.
        item_bytes: Bytes of every other number, where the model is not loaded; default as stored.
    """
    from torch.nn import Embedding, Linear

    config = core(model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", None)
    inner = getattr(config, "moe_intermediate_size", None) if experts else None
    head = core(model).get_output_embeddings()
    small = {id(m.weight) for m in model.modules() if isinstance(m, Linear) and m is not head} if in_4bit else set()
    weight_bytes, trained, trained_bytes, largest = 0.0, 0, 0, 0
    for weight in model.parameters():
        size = weight.numel() * (item_bytes or weight.element_size())
        if weight.requires_grad:
            trained, trained_bytes, largest = trained + weight.numel(), trained_bytes + size, max(largest, size)
        weight_bytes += 0.52 * weight.numel() if id(weight) in small and not weight.requires_grad else size
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query=heads * head_dim,
        key=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        inner=inner * experts if inner and experts else getattr(config, "intermediate_size", 4 * config.hidden_size),
        vocabulary=config.vocab_size,
        weight_bytes=weight_bytes,
        trained=trained,
        trained_bytes=trained_bytes,
        largest_trained=largest,
        embedded=sum(m.weight.numel() for m in model.modules() if isinstance(m, Embedding) and m.weight.requires_grad),
    )


def work_of(config: TrainConfig, base: Base, shape: Shape, *, packed: bool, item_bytes: int = 2) -> Work:
    """What a run asks of each of its GPUs."""
    from importlib.util import find_spec

    from vlrank.training.collate import ANSWER_ROOM

    longest = config.ranking.max_prompt_tokens + ANSWER_ROOM
    compiled = packed and config.compile is not False
    return Work(
        shape=shape,
        longest=longest,
        prompts=-(-config.batch_size // config.workers),
        fused=compiled or base.unsloth,
        item_bytes=item_bytes,
        whole_loss=config.loss == "all",
        tower=config.train_vision,
        offloads=base.unsloth,
        ranks=config.workers if config.parallel == "fsdp2" else 1,
        rows_per_prompt=max(1, (config.negatives + 1) // 10) if base.unsloth else 1,
        optim=None if config.optim == "auto" else config.optim,
        recompute=config.gradient_checkpointing,
        tokens=max(config.pack_tokens, longest) if packed and config.pack_tokens else None,
        eight_bit=base.method == "full" and config.parallel == "ddp" and find_spec("bitsandbytes") is not None,
    )


def free_gpu_memory(config: TrainConfig, device: Any) -> float:
    """Bytes that this process may take of a GPU: what is free, within ``gpu_memory_gib``, a share and a cap."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    bounds = [free + torch.cuda.memory_reserved(device), min(1.0, config.gpus_per_worker or 1.0) * total]
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):
        bounds.append(torch.cuda.get_per_process_memory_fraction(device) * total)
    if config.gpu_memory_gib is not None:
        bounds.append(config.gpu_memory_gib * GIB)
    return float(min(bounds))


def with_passes(plan: MemoryPlan, work: Work, tokens: int) -> MemoryPlan:
    """The plan with passes of exactly ``tokens`` tokens."""
    peak = max(work.peak(tokens, plan.recompute, plan.optim), work.reading(plan.read_tokens, plan.optim))
    return replace(plan, tokens=tokens, peak=peak)


def with_gathered(plan: MemoryPlan, config: TrainConfig, model: Any) -> MemoryPlan:
    """The plan of a run with sharded weights, which keeps them between forward and backward pass where they fit.

    Gathering them once instead of twice saves a third of what GPUs send each other.
    """
    item_bytes = 4 if config.dtype == "float32" else 2
    gathered = item_bytes * sum(weight.numel() for weight in model.parameters())
    if plan.peak + gathered > _USABLE * plan.memory:
        return plan
    return replace(plan, peak=plan.peak + gathered, keeps_gathered=True)


UNBOUNDED = math.inf
"""The memory of a CPU, as far as plans go."""
