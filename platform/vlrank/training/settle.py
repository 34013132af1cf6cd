"""Settings that a run leaves open, decided once, by the machine that trains; config.yaml names what was used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from vlrank.config import TrainConfig
from vlrank.data.tables import atomic_write_text
from vlrank.engines.families import check_architecture
from vlrank.engines.resources import GIB
from vlrank.errors import UserError
from vlrank.prompting.modes import mode_spec
from vlrank.storage import Location
from vlrank.training.collate import ANSWER_ROOM
from vlrank.training.memory import UNBOUNDED, MemoryPlan, Work, free_gpu_memory, make_plan, shape_of, work_of
from vlrank.training.model import Base, adapt, model_class

if TYPE_CHECKING:
    import torch

OPEN = (None, "auto")
"""Values that leave a setting to the run."""
_KEPT = ("optim", "dtype")
"""Settings that a continued run keeps as its first part decided them: its optimizer state depends on them."""


def settle(config: TrainConfig, base: Base, device: torch.device) -> tuple[TrainConfig, MemoryPlan]:
    """Decide number format, packing, recomputation, optimizer and loader processes.

    Args:
        config: As given.
        base: The base model, on this node.
        device: Where it will be trained.

    Returns:
        The config with these decided, and how the run fits the device.

    Raises:
        UserError: the run fits no way, or the model's configuration cannot be read.
    """
    import torch

    on_gpu = device.type == "cuda"
    packing = config.packing if config.packing is not None else on_gpu
    compiles = packing and not base.unsloth  # Unsloth has kernels of its own
    decided: dict[str, Any] = {
        "dtype": config.dtype if config.dtype != "auto" else default_dtype(on_gpu),
        "packing": packing,
        "compile": compiles and (config.compile if config.compile is not None else on_gpu),
        "loader_workers": config.loader_workers if config.loader_workers is not None else (4 if on_gpu else 0),
    }
    config = config.model_copy(update=decided)
    if on_gpu:
        memory = free_gpu_memory(config, device)
        if config.gpu_memory_gib is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.gpu_memory_gib * GIB / total), device)
        plan = plan_for(config, base, least_of_ranks(memory, device))
    else:
        plan = MemoryPlan(65536, bool(config.gradient_checkpointing), _first_optimizer(config), 8192, 0.0, UNBOUNDED)
    return config.model_copy(update={"gradient_checkpointing": plan.recompute, "optim": plan.optim}), plan


def plan_for(config: TrainConfig, base: Base, memory: float) -> MemoryPlan:
    """How a run fits ``memory`` bytes of a GPU, before its model is loaded.

    Raises:
        UserError: it fits no way, or the model's configuration cannot be read.
    """
    if not config.auto_batch:
        memory, config = UNBOUNDED, config.model_copy(update={"optim": _first_optimizer(config)})
        config = config.model_copy(update={"gradient_checkpointing": bool(config.gradient_checkpointing)})
    return make_plan(foreseen_work(config, base), memory)


def foreseen_work(config: TrainConfig, base: Base) -> Work:
    """What a run will ask of a GPU, from its model's configuration alone."""
    import torch
    from transformers import AutoConfig

    from vlrank.engines.packable import other_layers

    try:
        architecture = AutoConfig.from_pretrained(base.name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {base.name} cannot be loaded: {str(error).splitlines()[0]}",
            "Check `model`: a Hugging Face name this machine can reach, or a local folder.",
        ) from error
    check_architecture(architecture.to_dict(), base.name, mode_spec(config.mode))  # of a name, for the first time
    kind = model_class(base)
    with torch.device("meta"):
        model = kind.from_config(architecture)
        model = adapt(config, base, model)
    longest = config.ranking.max_prompt_tokens + ANSWER_ROOM
    packed = config.packing is not False and other_layers(architecture.get_text_config(), longest) is None
    item_bytes = 4 if config.dtype == "float32" else 2
    stored = 4 if config.parallel == "fsdp2" or (config.dtype == "float16" and base.method == "full") else item_bytes
    shape = shape_of(model, in_4bit=base.in_4bit, item_bytes=stored)
    return work_of(config, base, shape, packed=packed, item_bytes=item_bytes)


def default_dtype(on_gpu: bool) -> str:
    """bfloat16 on GPUs that compute in it, float16 on others (before Ampere), float32 on CPUs."""
    import torch

    if not on_gpu:
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def least_of_ranks(memory: float, device: torch.device) -> float:
    """The smallest ``memory`` of all ranks: they must make the same plan."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return memory
    least = torch.tensor(memory, dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least)


def _first_optimizer(config: TrainConfig) -> Any:
    return "adamw" if config.optim == "auto" else config.optim


def with_kept(config: TrainConfig, folder: Location) -> TrainConfig:
    """The config of a run that is continued: what must stay is as config.yaml of its first part says."""
    path = folder / "config.yaml"
    if not path.is_file():
        return config
    saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    kept = {key: saved[key] for key in _KEPT if getattr(config, key) in OPEN and saved.get(key) not in OPEN}
    return config.model_copy(update=kept)


def record_used(config: TrainConfig) -> None:
    """Write what a run uses into its config.yaml."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    atomic_write_text(config.out / "config.yaml", text)
