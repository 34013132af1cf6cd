"""Models to train: loaded, partly frozen, adapted, with logits only at the places that are learned."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlrank.config import TrainConfig
from vlrank.data.tables import read_json
from vlrank.engines.families import check_architecture, vision_family
from vlrank.engines.models import known_config, model_place
from vlrank.engines.resources import maybe_quantised
from vlrank.engines.structure import core
from vlrank.engines.weights import check_whole, load_whole
from vlrank.errors import UserError
from vlrank.installation import install_command
from vlrank.prompting.chat_template import check_chat_template
from vlrank.prompting.modes import Family, ModeSpec, mode_spec
from vlrank.storage import Location
from vlrank.training.collate import ANSWER_ROOM

if TYPE_CHECKING:
    import torch

    from vlrank.prompting.encoding import Encoder
    from vlrank.training.answers import AnswerHead

FOLDERS: dict[Family, str] = {"text": "qwen3vl_rerank", "vision": "qwen3vl_rerank_vl"}
"""Folder of a run's checkpoints, by family."""


@dataclass(frozen=True, slots=True)
class Base:
    """What is known of the base model of a run without loading it.

    Attributes:
        name: Hugging Face name, the absolute path of a local folder, or a URL.
        family: Text or vision.
        method: ``lora`` or ``full``.
        unsloth: Whether Unsloth loads and patches it.
        in_4bit: Whether its linear layers are quantised to NF4.
    """

    name: str
    family: Family
    method: Literal["lora", "full"]
    unsloth: bool
    in_4bit: bool

    @property
    def maybe_quantised(self) -> bool:
        """See `resources.maybe_quantised`."""
        return maybe_quantised(self.name)


@dataclass(slots=True)
class Trainable:
    """A model ready for training.

    Attributes:
        model: A `PreTrainedModel` or `PeftModel`.
        processor: Saved beside every checkpoint: the processor of vision models, the tokenizer of text models.
        encoder: Prompts -> token ids and pixels, of this model.
        head: Restricts the model's end to the learned places.
    """

    model: Any
    processor: Any
    encoder: Encoder
    head: AnswerHead


def resolve_base(config: TrainConfig) -> Base:
    """Decide what is loaded, and find mistakes before anything is.

    Raises:
        UserError: a local folder that is no model of the mode's family or whose chat template cannot be used, or
            Unsloth asked for and not installed.
    """
    from importlib.util import find_spec

    from vlrank.config import mode_defaults

    spec = mode_spec(config.mode)
    defaults = mode_defaults(config.mode)
    name = config.model or defaults["model"]
    method = config.method or defaults["method"]
    if (place := model_place(name)) is not None:
        name = str(_model_folder(place.resolve(), spec))
    elif config_at_hand := known_config(name):
        check_architecture(config_at_hand, name, spec)
    check_chat_template(name, pictures=spec.pixels)
    if method == "full" and ("bnb-4bit" in name or _stored_quantised(name)):
        raise UserError(
            f"method: full cannot train {name}: its weights are quantised",
            "Set `model` to full weights (Qwen/Qwen3-0.6B), or method: lora.",
        )
    if spec.family == "vision" or method == "full":
        if config.backend == "unsloth":
            raise UserError(
                f"backend: unsloth trains text models with LoRA, not mode {config.mode} with method {method}",
                "Leave `backend` at auto.",
            )
        return Base(name, spec.family, method, unsloth=False, in_4bit=False)
    installed = find_spec("unsloth") is not None
    if config.backend == "unsloth" and not installed:
        raise UserError(
            "backend: unsloth, but Unsloth is not installed", install_command("unsloth", "unsloth-zoo", "bitsandbytes")
        )
    in_4bit = config.load_in_4bit if config.load_in_4bit is not None else find_spec("bitsandbytes") is not None
    return Base(name, "text", method, unsloth=installed and config.backend != "transformers", in_4bit=in_4bit)


def _stored_quantised(folder: str) -> bool:
    config = Path(folder) / "config.json"
    return config.is_file() and "quantization_config" in read_json(config)


def _model_folder(given: Location, spec: ModeSpec) -> Location:
    """The folder with the weights: of a run of `vlrank train` that of its best checkpoint."""
    from vlrank.engines.models import best_checkpoint

    folder = best_checkpoint(given)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"model {given} holds an adapter, and training starts from whole weights", "Name its base model."
            )
        raise UserError(f"model folder {folder} has no config.json", "Give a Hugging Face name or a model folder.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"model folder {folder} has no tokenizer", "Copy tokenizer.json of its base model into it.")
    check_architecture(read_json(folder / "config.json"), str(folder), spec)
    return folder


def load_trainable(config: TrainConfig, base: Base, device: torch.device) -> Trainable:
    """Load, freeze and adapt the base model.

    Args:
        config: With ``dtype`` and ``gradient_checkpointing`` decided.
        base: The base model, on this node.
        device: Where it will be trained.

    Raises:
        UserError: the model cannot be found or lacks a tokenizer or image processor.
    """
    import torch
    from transformers import AutoConfig, AutoProcessor

    from vlrank.prompting.encoding import Encoder
    from vlrank.training.answers import AnswerHead

    spec = mode_spec(config.mode)
    dtype = weight_dtype(config, base)
    torch.manual_seed(config.seed)  # adapters start at random
    try:
        check_architecture(AutoConfig.from_pretrained(base.name).to_dict(), base.name, spec)
        model = (_load_unsloth if base.unsloth else _load_transformers)(config, base, device, dtype)
        encoder = Encoder.load(base.name, spec, config.ranking)
        processor = AutoProcessor.from_pretrained(base.name) if base.family == "vision" else encoder.tokenizer
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {base.name} cannot be loaded: {str(error).splitlines()[0]}",
            "Check `model`: a Hugging Face name this machine can reach, or a local folder.",
        ) from error
    model.config.use_cache = False
    if config.gradient_checkpointing and not base.unsloth:
        recompute_layers(model)
    return Trainable(model, processor, encoder, AnswerHead(model, last_layer=config.loss == "answer"))


def recompute_layers(model: Any) -> None:
    """Keep only the layers' inputs for the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()


def weight_dtype(config: TrainConfig, base: Base) -> torch.dtype:
    """The type of the weights, of a config whose ``dtype`` is decided.

    float32 where they are sharded, or where all of them train in float16: computed in less than they are kept in.
    """
    import torch

    if config.parallel == "fsdp2" or (config.dtype == "float16" and base.method == "full"):
        return torch.float32
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def model_class(base: Base) -> Any:
    """What transformers loads the base model as."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if base.family == "vision" else AutoModelForCausalLM


def _load_transformers(config: TrainConfig, base: Base, device: torch.device, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"dtype": dtype}
    if base.in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
        options["device_map"] = {"": device}
    model = load_whole(model_class(base), base.name, **options)
    if base.in_4bit:
        exact_4bit_on_cpu(model)
    else:
        model.to(device)
    return adapt(config, base, model)


def adapt(config: TrainConfig, base: Base, model: Any) -> Any:
    """Freeze what does not learn, and add adapters for ``method: lora``.

    Raises:
        UserError: ``lora.target_modules`` names no layer of the model.
    """
    from torch.nn import Linear

    if base.method == "full":
        if base.family == "vision":
            model.model.visual.requires_grad_(config.train_vision)
        return model
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if "weight" in module._parameters}
    if not names & set(config.lora.target_modules):
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear)}
        raise UserError(
            f"no layer of {base.name} is named {', '.join(config.lora.target_modules)} (lora.target_modules)",
            f"Name some of these: {', '.join(sorted(linear or names))}.",
        )
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        task_type="CAUSAL_LM",
        exclude_modules=r".*\.visual\..*" if base.family == "vision" else None,
    )
    # Adapters in the weights' type: float32 ones make every activation be cast to float32 and back. The optimizer keeps
    # float32 masters of bfloat16 ones (see `MasterAdamW`); scaled losses of float16 need float32 ones.
    return get_peft_model(model, lora, autocast_adapter_dtype=config.dtype == "float16")


def _load_unsloth(config: TrainConfig, base: Base, device: torch.device, dtype: torch.dtype) -> Any:
    from vlrank.compat import hide_vllm

    hide_vllm()
    # Unsloth returns no logits in training unless asked; and it may neither phone home nor redirect model names.
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        base.name,
        max_seq_length=config.ranking.max_prompt_tokens + ANSWER_ROOM,
        load_in_4bit=base.in_4bit,
        dtype=dtype,
        local_files_only=Path(base.name).is_dir(),
    )
    check_whole(model, base.name)
    exact_4bit_on_cpu(model)
    return FastLanguageModel.get_peft_model(
        model,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        use_gradient_checkpointing="unsloth" if config.gradient_checkpointing else False,
        random_state=config.seed,
    )


def exact_4bit_on_cpu(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16.

    It does so at the first forward pass without gradients (validation), and every later backward pass is wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


# ---- pictures -------------------------------------------------------------------------------------------------------


def accept_features(model: Any) -> int:
    """Let ``pixel_values`` of a vision model be cached features of its (frozen) tower; pixels are still accepted.

    Returns:
        Width of a feature row: the tower's output and the deepstack features behind it.

    Raises:
        ValueError: pixels and features have the same width and could not be told apart.
    """
    inner = core(model).model
    family, config = vision_family(core(model).config), core(model).config.vision_config
    width = family.width(config)
    if width == config.in_channels * config.temporal_patch_size * config.patch_size**2:
        raise ValueError("vision features are as wide as a patch of pixels: set cache_vision: false")
    compute: Callable[..., Any] = inner.get_image_features

    def get_image_features(
        pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if pixel_values.shape[-1] != width:
            return compute(pixel_values, image_grid_thw, **kwargs)
        # One chunk for all pictures: the caller concatenates them anyway, and splitting would wait for the GPU.
        return family.output(pixel_values, config)

    inner.get_image_features = get_image_features
    return width


def tower_key(model: Any, encoder: Encoder, paths: Sequence[str]) -> str:
    """Names what cached features depend on: the tower's weights, the picture preparation and the pictures."""
    import torch

    from vlrank.prompting.encoding import PREPARATION

    digest = hashlib.sha256()
    tower = core(model).model.visual
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(encoder.image_processor.to_dict(), sort_keys=True, default=str).encode())
    digest.update(f"{encoder.ranking.max_image_pixels} {PREPARATION}".encode())
    for path in paths:
        try:
            status = os.stat(path)
            identity = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:  # compute_features says which pictures cannot be read
            identity = "unreadable"
        digest.update(f"{path}\0{identity}\n".encode())
    return digest.hexdigest()[:24]


def image_features(model: Any, encoder: Encoder, paths: Sequence[str]) -> torch.Tensor:
    """What a frozen vision tower gives for pictures: [visual tokens, (1 + D) * hidden], deepstack features behind."""
    import numpy as np
    import torch

    inner = core(model).model
    device = next(inner.visual.parameters()).device
    pixels = torch.from_numpy(np.concatenate([encoder.pixels(path) for path in paths])).to(device)
    grids = torch.tensor([encoder.grid(path) for path in paths], device=device)
    with torch.no_grad():
        output = inner.visual(pixels.to(inner.visual.dtype), grid_thw=grids, return_dict=True)
    return vision_family(core(model).config).features(output)
