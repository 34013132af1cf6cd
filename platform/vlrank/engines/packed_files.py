"""A packed model straight from its files, without transformers, PEFT and bitsandbytes.

Importing these takes longer than ranking a thousand users. What is read here is exactly what they would have loaded:
every tensor of the files has to be accounted for, and an architecture, an adapter or a quantisation beyond the plain
ones is left to them. On top of that a layout of files is read here only after one model of that layout has been loaded
both ways with the same bits (`remember`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlrank.data.tables import atomic_write_json, read_json
from vlrank.engines.models import ModelFolder
from vlrank.engines.packed_layer import Adapter, Layer, Matrix, Sizes
from vlrank.engines.packed_model import PackedModel, Unsuited, merged, side_by_side
from vlrank.engines.packed_rotary import Rotary
from vlrank.engines.resources import beyond_packed
from vlrank.storage import cache_folder, location, writable

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
_FOUR_BITS = re.compile(r"(.+\.weight)\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__\w+)")
_SPECIAL = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "use_qalora"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens", "use_bdlora"),
    *("arrow_config", "corda_config", "eva_config", "velora_config"),
)
"""Settings of PEFT that make more of LoRA than a product of two matrices."""
_NOT_LAYOUT = ("_name_or_path", "transformers_version", "base_model_name_or_path", "revision", "inference_mode")
_UNREADABLE = (Unsuited, SafetensorError, OSError, KeyError, TypeError, ValueError)
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def read_known(model: ModelFolder, dtype: torch.dtype, device: torch.device) -> PackedModel | None:
    """The language model of a folder, if its layout is known to be read right; else None.

    Args:
        model: What to read, on this node.
        dtype: Of its weights and activations.
        device: Where they go.
    """
    try:
        with _Files(model) as files:
            if not _record(files, dtype, device).is_file():
                return None
            return _packed(files, dtype, device)
    except _UNREADABLE:
        return None  # the libraries will say what is wrong, if anything is


def remember(model: ModelFolder, loaded: PackedModel) -> bool:
    """Read a model that the libraries have loaded, and let its layout be known if every bit is the same.

    Args:
        model: Its folder, on this node.
        loaded: From the libraries.

    Returns:
        Whether the layout is known now.
    """
    dtype, device = loaded.dtype, loaded.device
    try:
        with _Files(model) as files:
            record = _record(files, dtype, device)
            if not writable(record.parent) or not _same(_packed(files, dtype, device), loaded):
                return False
            atomic_write_json(record, {"model": model.path, "base": model.base, "dtype": str(dtype)})
    except (*_UNREADABLE, torch.OutOfMemoryError):
        return False
    return True


# ---- files -----------------------------------------------------------------------------------------------------------


class _Files:
    """The open files of a model and of its adapter, as a context manager.

    Attributes:
        config, adapter_config: Their settings; the second one is empty without an adapter.
        base, adapter: Name of a tensor -> the open file that holds it.
        used: Names of ``base`` and ``adapter`` that were read.
    """

    def __init__(self, model: ModelFolder) -> None:
        self._stack = ExitStack()
        folder = _folder(model.base, model.revision)
        self.config = read_json(folder / "config.json")
        self.adapter_config: dict[str, Any] = {}
        self.base = self._opened(sorted(folder.glob("*.safetensors")))
        self.adapter: dict[str, Any] = {}
        if model.is_adapter:
            place = _folder(model.path, None)
            self.adapter_config = read_json(place / "adapter_config.json")
            self.adapter = self._opened([place / "adapter_model.safetensors"])
        self.used: set[str] = set()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _opened(self, paths: list[Path]) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for path in paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118
                if name in names:
                    raise Unsuited(f"{name} lies in two files")
                names[name] = file
        if not names:
            raise Unsuited("it has no safetensors files")
        return names

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the base model."""
        self.used.add(name)
        found: torch.Tensor = self.base[name].get_tensor(name)
        return found

    def adapted(self, name: str) -> torch.Tensor:
        """A tensor of the adapter."""
        self.used.add(name)
        found: torch.Tensor = self.adapter[name].get_tensor(name)
        return found

    def layout(self) -> dict[str, Any]:
        """All that decides how the files are to be read, beside their numbers."""

        def shapes(names: Mapping[str, Any]) -> list[Any]:
            slices = {name: file.get_slice(name) for name, file in names.items()}
            return sorted([name, part.get_dtype(), part.get_shape()] for name, part in slices.items())

        def settings(config: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in config.items() if key not in _NOT_LAYOUT}

        return {
            "config": settings(self.config),
            "base": shapes(self.base),
            # The order of an adapter's modules is that of a Python set.
            "adapter_config": {
                key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
                for key, value in settings(self.adapter_config).items()
            },
            "adapter": shapes(self.adapter),
        }


def _folder(model: str, revision: str | None) -> Path:
    """A model's folder on this disk; of a hub name, the one in the hub's cache."""
    place = location(model)
    if isinstance(place, Path) and place.is_dir():
        return place
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise Unsuited("it is not on this disk")
    index = Path(cached).parent / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json(index)["weight_map"].values())
        if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
            raise Unsuited(f"it lacks {missing[0]}")
    return Path(cached).parent


def _record(files: _Files, dtype: torch.dtype, device: torch.device) -> Path:
    """The file that says that a layout is known; the libraries and the device are a part of it."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    known = {"layout": files.layout(), "versions": versions, "dtype": str(dtype), "device": kind}
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("packed*.py"))]
    known["code"] = [hashlib.sha256(content).hexdigest() for content in code]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "layouts" / f"{digest[:32]}.json"


# ---- from files to layers --------------------------------------------------------------------------------------------


def _packed(files: _Files, dtype: torch.dtype, device: torch.device) -> PackedModel:
    """Read a model.

    Raises:
        Unsuited: it is not plain.
    """
    whole = files.config
    config = whole.get("text_config") or whole
    if why := beyond_packed(whole):
        raise Unsuited(why)
    if missing := [key for key in _SIZES if config.get(key) is None]:
        raise Unsuited(f"its config.json does not say {missing[0]}")
    if config.get("hidden_act", "silu") != "silu" or config.get("use_sliding_window"):
        raise Unsuited("its layers are not plain")
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or _implied_head_dim(whole, config)
    reader = _Reader(files, dtype, device, _prefix(files.base), _lora(files.adapter_config))
    embeddings = reader.own("embed_tokens.weight")
    tied = bool(whole.get("tie_word_embeddings", config.get("tie_word_embeddings")))
    if tied == ("lm_head.weight" in files.base):
        raise Unsuited("its output head is stored, and tied to its embeddings, or neither")
    if tied and any(".lm_head." in name or ".embed_tokens." in name for name in files.adapter):
        raise Unsuited("its embeddings are adapted")
    layers = [reader.layer(i) for i in range(config["num_hidden_layers"])]
    norm = reader.own("norm.weight")
    head = Matrix(embeddings) if tied else reader.matrix("lm_head")
    left = {name for name in files.base if name not in files.used and not _beside_language(name)}
    if left or files.adapter.keys() - files.used:
        raise Unsuited("its files hold more than its language model")
    return PackedModel(
        sizes=Sizes(heads, key_heads, head_dim, config["rms_norm_eps"]),
        scaling=head_dim**-0.5,
        embeddings=embeddings,
        rotary=Rotary.of(config, head_dim, device),
        axes=1,
        layers=layers,
        norm=norm,
        head=head,
        family=None,
        visual=None,
    )


def _implied_head_dim(whole: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    if whole["model_type"] in ("qwen3", "qwen3_vl"):
        raise Unsuited("its config.json does not say head_dim")  # these have a default of their own
    return int(config["hidden_size"] // config["num_attention_heads"])


def _prefix(names: Mapping[str, Any]) -> str:
    """What stands before ``layers.0`` in the names of the language model's tensors."""
    found = [name.removesuffix("embed_tokens.weight") for name in names if name.endswith("embed_tokens.weight")]
    if len(found) != 1:
        raise Unsuited("its embeddings are not found")
    return found[0]


def _beside_language(name: str) -> bool:
    """Whether a tensor belongs to a vision tower, which text does not meet."""
    return name.startswith(("visual.", "model.visual."))


def _lora(config: Mapping[str, Any]) -> float:
    """The factor of a plain LoRA adapter's product; 0 without an adapter."""
    if not config:
        return 0.0
    special = [key for key in _SPECIAL if config.get(key)]
    if special or config.get("peft_type", "LORA") != "LORA" or config.get("bias", "none") != "none":
        raise Unsuited(f"its adapter is not plain ({', '.join(special) or config.get('peft_type')})")
    rank, alpha = config["r"], config["lora_alpha"]
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


@dataclass(slots=True)
class _Reader:
    """Reads a model's layers.

    Attributes:
        files: Where they are.
        dtype, device: What tensors become.
        prefix: Of the language model's names.
        scaling: Of the adapter's products.
    """

    files: _Files
    dtype: torch.dtype
    device: torch.device
    prefix: str
    scaling: float
    four_bits: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.four_bits = {match[1] for name in self.files.base if (match := _FOUR_BITS.fullmatch(name))}

    def layer(self, i: int) -> Layer:
        """A decoder layer."""
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        normed = f"{self.prefix}{attention}q_norm.weight" in self.files.base
        return Layer(
            norm=self.own(f"layers.{i}.input_layernorm.weight"),
            qkv=self._joined(*(f"{attention}{name}_proj" for name in "qkv")),
            q_norm=self.own(f"{attention}q_norm.weight") if normed else None,
            k_norm=self.own(f"{attention}k_norm.weight") if normed else None,
            o=self.matrix(f"{self.prefix}{attention}o_proj"),
            mlp_norm=self.own(f"layers.{i}.post_attention_layernorm.weight"),
            gate_up=self._joined(f"{mlp}gate_proj", f"{mlp}up_proj"),
            down=self.matrix(f"{self.prefix}{mlp}down_proj"),
        )

    def own(self, name: str) -> torch.Tensor:
        """A tensor of the language model that nothing adapts."""
        return self._sent(self.files.tensor(self.prefix + name))

    def matrix(self, module: str) -> Matrix:
        """A linear layer with its adapter merged."""
        name = f"{module}.weight"
        weight = self._four_bits(name) if name in self.four_bits else self._sent(self.files.tensor(name))
        bias = self._sent(self.files.tensor(f"{module}.bias")) if f"{module}.bias" in self.files.base else None
        down, up = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
        if down in self.files.adapter:
            b, a = (self.files.adapted(part).to(self.device) for part in (up, down))
            weight = merged(weight, [Adapter(b, a, self.scaling)])
        return Matrix(weight, bias)

    def _joined(self, *modules: str) -> Matrix:
        return side_by_side([self.matrix(self.prefix + module) for module in modules])

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise Unsuited(f"it has weights of {tensor.dtype}")
        # A copy: the file may change while the model is used.
        return tensor.to(self.device, copy=True).to(self.dtype)

    def _four_bits(self, name: str) -> torch.Tensor:
        """A matrix that bitsandbytes stored: 4-bit numbers of a table, with a factor for each block of them.

        As in bitsandbytes' `dequantize_4bit`: the factors may themselves be 8-bit numbers with factors and an offset.
        """

        def part(kind: str) -> torch.Tensor:
            return self.files.tensor(f"{name}.{kind}").to(self.device)

        [stated] = [key for key in self.files.base if key.startswith(f"{name}.quant_state.bitsandbytes__")]
        state = json.loads(bytes(self.files.tensor(stated).tolist()))
        if state["shape"][-1] % state["blocksize"]:
            raise Unsuited("blocks of its 4-bit weights span rows, which bitsandbytes reads differently on a CPU")
        factors = part("absmax")
        if "nested_offset" in state:
            blocks = part("nested_absmax").repeat_interleave(state["nested_blocksize"])[: len(factors)]
            factors = part("nested_quant_map")[factors.long()] * blocks + state["nested_offset"]
        packed = self.files.tensor(name).to(self.device).flatten()
        pairs = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
        count = math.prod(state["shape"])
        values = part("quant_map")[pairs[:count].long()].view(-1, state["blocksize"]) * factors.float()[:, None]
        stored = getattr(torch, state["dtype"])
        computed = self.files.config["quantization_config"].get("bnb_4bit_compute_dtype") or "float32"
        whole = values.view(state["shape"]).to(stored)
        return whole.to(getattr(torch, str(computed).removeprefix("torch."))).to(self.dtype)


# ---- the comparison --------------------------------------------------------------------------------------------------


def _same(own: PackedModel, loaded: PackedModel) -> bool:
    """Whether two models are the same to the bit, the rotary positions of the longest prompts included."""
    if own.sizes != loaded.sizes or own.scaling != loaded.scaling or len(own.layers) != len(loaded.layers):
        return False
    tensors = zip(_tensors(own), _tensors(loaded), strict=True)
    if not all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in tensors):
        return False
    places = torch.arange(0, 40_000, 7, device=own.device)[None]
    wide = places.expand(3, 1, -1) if loaded.axes == 3 else places
    return all(
        torch.equal(a[0], b[0])
        for a, b in zip(own.rotary(own.norm, places), loaded.rotary(loaded.norm, wide), strict=True)
    )


def _tensors(model: PackedModel) -> Iterator[torch.Tensor | None]:
    yield from (model.embeddings, model.norm, model.head.weight, model.head.bias)
    for layer in model.layers:
        for part in layer:
            yield from part[:2] if isinstance(part, Matrix) else (part,)
