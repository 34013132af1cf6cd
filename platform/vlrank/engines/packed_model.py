"""Qwen3, Qwen2, Llama, Qwen3-VL and Qwen2.5-VL as packed rows need them: merged weights, few products, no logits.

The forward pass is that of transformers' models, operation by operation. What differs is where it saves work: adapters
are merged, query, key and value share one product as gate and up do, and the last layer ends at the places to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding

from vlrank.engines.families import vision_family
from vlrank.engines.families.family import VisionFamily
from vlrank.engines.packable import varying_rotation
from vlrank.engines.packed_attention import RowAttention
from vlrank.engines.packed_layer import (
    E4M3_MAX,
    Adapter,
    Layer,
    LiveMatrix,
    LivePart,
    Matrix,
    Sizes,
    after_attention,
    before_attention,
    rms_norm,
)
from vlrank.engines.packed_rotary import Rotary, UnknownRotary
from vlrank.engines.resources import beyond_packed
from vlrank.engines.structure import core, decoder_layers

_ALIGNMENT = 64
"""Bytes at whose multiples PyTorch begins its own tensors on CPUs."""


class Unsuited(ValueError):
    """A model that this engine does not compute; says why."""


@dataclass(slots=True)
class PackedModel:
    """A model's weights, ready for packed rows.

    Attributes:
        sizes: Of its layers.
        scaling: Factor of attention scores.
        embeddings: [vocabulary, hidden].
        rotary: Hidden states and positions -> cos and sin.
        axes: 3 where positions are a vision model's (time, row, column), else 1.
        layers, norm: The language model.
        head: The output embeddings; their rows are taken to float32 where they are read.
        family, visual: Of a vision model, and its tower as transformers has it; else None.
        before, after: `before_attention` and `after_attention`, here or in `packed_kernels`.
    """

    sizes: Sizes
    scaling: float
    embeddings: torch.Tensor
    rotary: nn.Module
    axes: int
    layers: list[Layer]
    norm: torch.Tensor
    head: Matrix
    family: VisionFamily | None
    visual: Any
    before: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = before_attention
    after: Callable[..., torch.Tensor] = after_attention

    @classmethod
    def of(cls, model: Any, *, keep: bool = False, live: bool = False) -> PackedModel:
        """Take the weights of a transformers model, plain or PEFT, in its own type.

        Args:
            model: On the device where it will be used.
            keep: Leave the model whole; otherwise its layers are given up one by one, to save memory.
            live: Share its weights, which may go on learning, instead of joining and merging them; implies ``keep``.

        Raises:
            Unsuited: an architecture, a kind of adapter or of quantisation that is not computed here.
        """
        plain = core(model)
        check(plain.config)
        config, inner = plain.config.get_text_config(), plain.model
        text = getattr(inner, "language_model", inner)
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        embeddings, head = plain.get_input_embeddings(), plain.get_output_embeddings()
        if type(embeddings) is not nn.Embedding:
            raise Unsuited(f"its embeddings are a {type(embeddings).__name__}")
        if hasattr(embeddings.weight, "full_tensor"):
            raise Unsuited("its weights are sharded")
        layers, stored = [], decoder_layers(model)
        for i in range(len(stored)):
            layers.append(_layer(stored[i], embeddings.weight.dtype, _live if live else _joined))
            if not keep and not live:
                stored[i] = nn.Identity()
        return cls(
            sizes=Sizes(heads, key_heads, head_dim, config.rms_norm_eps),
            scaling=head_dim**-0.5,
            embeddings=embeddings.weight.detach(),
            rotary=_rotary(text, config, head_dim, embeddings.weight.device),
            axes=3 if hasattr(inner, "visual") else 1,
            layers=layers,
            norm=text.norm.weight.detach(),
            head=_matrix(head, embeddings.weight.dtype),
            family=vision_family(plain.config) if hasattr(inner, "visual") else None,
            visual=getattr(inner, "visual", None),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self.embeddings.dtype

    def float8(self) -> PackedModel:
        """The same model with its layers' matrices rounded to float8, each row with a scale of its own."""
        names = ("qkv", "o", "gate_up", "down")
        layers = [layer._replace(**{name: _float8(getattr(layer, name)) for name in names}) for layer in self.layers]
        return replace(self, layers=layers)

    @torch.no_grad()
    def forward(
        self,
        attention: RowAttention,
        features: torch.Tensor | None = None,
        context: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None,
        store: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Hidden states at the places that are read, after the last norm: [reads, hidden].

        Args:
            attention: Of the row, which it holds.
            features: Of the row's visual tokens, [visual tokens, (1 + D) * hidden]: the tower's output, then what its
                deepstack layers add behind the first D layers.
            context: A layer's number -> keys and values of the prefixes that the row continues.
            store: Called with each layer's number, keys and values: the row holds prefixes. Nothing is read then.
        """
        row = attention.tensors
        x = embedding(row["ids"], self.embeddings)
        deepstack: tuple[torch.Tensor, ...] = ()
        visual = None
        if features is not None:
            visual = row["visual"]
            first, *rest = features.to(self.dtype).split(x.shape[1], dim=1)
            x, deepstack = x.index_copy(0, visual, first), tuple(rest)
        positions = row["positions"]
        cos, sin = self.rotary(x, positions[:, None] if self.axes == 3 else positions[:1])
        cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            q, k, v = self.before(x, layer, cos, sin, self.sizes)
            prefix = context(i) if context is not None else None
            if store is not None:
                store(i, k, v)
                if last:
                    return x[:0]
            if last:
                # Nothing behind the last layer's keys and values mixes places any more.
                x = after_attention(x[row["reads"]], attention.at_reads(q, k, v, prefix), layer, self.sizes)
                break
            x = self.after(x, attention(q, k, v, prefix), layer, self.sizes)
            if visual is not None and i < len(deepstack):
                x.index_add_(0, visual, deepstack[i])
        return rms_norm(x, self.norm, self.sizes.epsilon)


def use_kernels(model: PackedModel) -> None:
    """Let a GPU compute what lies around the attention with kernels of our own."""
    try:
        from vlrank.engines import packed_kernels
    except ImportError as error:
        print(f"ranking is slower than it could be: Triton cannot be used ({error})", flush=True)
        return
    model.before, model.after = packed_kernels.before_attention, packed_kernels.after_attention


def check(config: Any) -> None:
    """Whether a model of this config is computed here, from the config alone.

    Raises:
        Unsuited: it is not.
    """
    if why := beyond_packed(config.to_dict()):
        raise Unsuited(why)
    text = config.get_text_config()
    if text.hidden_act != "silu":
        raise Unsuited(f"its activation is {text.hidden_act}, not silu")
    if why := varying_rotation(text):
        raise Unsuited(f"it has {why}")


def _rotary(text: Any, config: Any, head_dim: int, device: torch.device) -> nn.Module:
    """transformers' module, whose calls are known, or one of ours instead of what another library put there."""
    own: nn.Module = text.rotary_emb
    if type(own).__module__.startswith("transformers."):
        return own
    try:
        return Rotary.of(config.to_dict(), head_dim, device)
    except UnknownRotary as error:
        raise Unsuited(str(error)) from None


def _layer(layer: Any, dtype: torch.dtype, joined: Callable[..., Any]) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def norm(name: str) -> torch.Tensor | None:
        module = getattr(attention, name, None)
        return None if module is None else module.weight.detach().to(dtype)

    return Layer(
        norm=layer.input_layernorm.weight.detach().to(dtype),
        qkv=joined(dtype, attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=norm("q_norm"),
        k_norm=norm("k_norm"),
        o=joined(dtype, attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach().to(dtype),
        gate_up=joined(dtype, mlp.gate_proj, mlp.up_proj),
        down=joined(dtype, mlp.down_proj),
    )


def _joined(dtype: torch.dtype, *modules: Any) -> Matrix:
    return side_by_side([_matrix(module, dtype) for module in modules])


def side_by_side(parts: Sequence[Matrix]) -> Matrix:
    """Layers that share an input as one.

    Raises:
        Unsuited: some have a bias, others none.
    """
    biases = [part.bias for part in parts if part.bias is not None]
    if len(biases) not in (0, len(parts)):
        raise Unsuited("a part of its query, key and value projections has a bias")
    weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else _aligned(parts[0].weight)
    return Matrix(weight, torch.cat(biases) if biases else None)


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, from an address that PyTorch would have chosen: files put it anywhere.

    On CPUs the last bit of a product may depend on the address, and one file would score in two ways.
    """
    return matrix.clone() if matrix.data_ptr() % _ALIGNMENT else matrix


def _live(dtype: torch.dtype, *modules: Any) -> LiveMatrix:
    parts = []
    for module in modules:
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        bias = None if base.bias is None else base.bias.detach().to(dtype)
        parts.append(LivePart(partial(dequantised, base, dtype), bias, base.out_features, _adapters(module, base)))
    return LiveMatrix(parts)


def _float8(matrix: Matrix) -> Matrix:
    wide = matrix.weight.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return Matrix((wide / scale).to(torch.float8_e4m3fn), matrix.bias, scale.t().contiguous())


def _matrix(module: Any, dtype: torch.dtype) -> Matrix:
    """The weight of a linear layer, dequantised, with its adapters merged in float32 and rounded once."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight, bias = merged(dequantised(base, dtype), _adapters(module, base)), base.bias
    return Matrix(weight, None if bias is None else bias.detach().to(dtype))


def _adapters(module: Any, base: Any) -> list[Adapter]:
    """The active adapters of a linear layer."""
    found: list[Adapter] = []
    if base is module or module.disable_adapters or module.merged:
        return found
    for name in module.active_adapters:
        matrices = getattr(module, "lora_A", {})
        if name not in matrices or not isinstance(matrices[name], nn.Linear):
            raise Unsuited(f"its adapter {name} is a {type(module).__name__}, which cannot be merged")
        if module.lora_variant.get(name) or module.lora_bias.get(name) or getattr(module, "fan_in_fan_out", False):
            raise Unsuited(f"its adapter {name} is a variant of LoRA (DoRA, a bias, ...), which is not merged here")
        up, down = module.lora_B[name].weight.detach(), module.lora_A[name].weight.detach()
        found.append(Adapter(up, down, module.scaling[name]))
    return found


def merged(weight: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """A matrix [out, in] with LoRA adapters in it, computed in float32 and rounded once to its own type.

    These are the bits of PEFT's merge, which `vlrank export` uses for its variants of LoRA; it takes seconds to import.
    """
    if not adapters:
        return weight
    wide = weight.float()
    for adapter in adapters:
        wide = wide + adapter.scaling * (adapter.up.float() @ adapter.down.float())
    return wide.to(weight.dtype)


def dequantised(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that a linear layer computes with, [out, in]."""
    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        # In the type that training computed in: float32 numbers would be others.
        whole: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return whole.to(module.compute_dtype or dtype).to(dtype)
    if not isinstance(module, nn.Linear) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise Unsuited(f"its weights lie in a {type(module).__name__} of {weight.dtype}")
    return weight.detach().to(dtype)
