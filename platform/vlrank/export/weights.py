"""The files of a published model: copied, or merged in float32 and rounded once, or in 8 bits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlrank.data.tables import atomic_write_json
from vlrank.engines.adapters import check_adapter
from vlrank.engines.models import ModelFolder, model_config
from vlrank.engines.packed_load import with_plain_linears
from vlrank.engines.transformers_scorer import load_model
from vlrank.errors import UserError
from vlrank.reranking.ranker import tokenizer_folder

_TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "training_args.bin", "README.md")
_PROCESSING = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)


def write_model(model: ModelFolder, target: Path, *, merge: bool, quantization: str | None, dtype: str) -> None:
    """Write weights, tokenizer, processor and ``vlrank.json``.

    Args:
        model: Trained by vlrank; its folders are on this node.
        target: An empty folder.
        merge: Merge an adapter into its base.
        quantization: ``fp8``, or None.
        dtype: Of merged weights; ``auto`` is the base's own.

    Raises:
        UserError: the model cannot be loaded or merged.
    """
    details = {**model.details, "mode": model.mode, "family": model.family, "ranking": model.ranking.model_dump()}
    whole = not model.is_adapter or merge
    if quantization or (model.is_adapter and merge) or dtype != "auto":
        loaded = merged_model(model)
        wanted = getattr(torch, dtype) if dtype != "auto" else _own_dtype(model)
        loaded.to(wanted)
        loaded.config.dtype = wanted
        if quantization:
            _save_in_8_bits(loaded, target)
        else:
            loaded.save_pretrained(target)
        _copy_processing(model, target)
    else:
        for file in Path(model.path).iterdir():
            if file.is_file() and file.name not in _TRAINING_STATE and file.suffix != ".pth":
                shutil.copyfile(file, target / file.name)
    if whole:
        details.pop("base_model", None)
    if quantization:
        details["quantization"] = quantization
    atomic_write_json(target / "vlrank.json", details)


def merged_model(model: ModelFolder) -> Any:
    """The model in float32 on the CPU, its base's 4-bit weights as what they stand for, its adapter merged by PEFT.

    PEFT knows every variant of LoRA; of a plain one the result has the bits of the packed engine's `merged`.

    Raises:
        UserError: the model cannot be loaded, or PEFT cannot merge its adapter.
    """
    loaded = load_model(replace(model, path=model.base), "float32", device="cpu")
    if getattr(loaded, "hf_quantizer", None) is not None:
        loaded = _dequantised(loaded)
    if not model.is_adapter:
        return loaded
    from peft import PeftModel

    check_adapter(model, "transformers")
    if _adapts_embeddings(Path(model.path)):
        _untie(loaded)  # else an adapter of one of two tied matrices would change both
    try:
        loaded = PeftModel.from_pretrained(loaded, model.path).merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"the adapter {model.path} cannot be merged: {str(error).splitlines()[0]}", "Publish it alone: --no_merge."
        ) from error
    return loaded


def _dequantised(model: Any) -> Any:
    """The model in float32 as if it had never been in 4 bits: it is cast, merged and saved like any other."""
    quantizer = model.hf_quantizer
    model = torch.nn.Module.float(with_plain_linears(model))
    quantizer.remove_quantization_config(model)
    # How weights were read is turned round when they are saved; what reads 4-bit weights cannot be.
    kept = [one for one in getattr(model, "_weight_conversions", None) or [] if _reversible(one)]
    model._weight_conversions = kept
    return model


def _reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _adapts_embeddings(adapter: Path) -> bool:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as tensors:
        return any("lm_head" in key or "embed_tokens" in key for key in tensors.keys())  # noqa: SIM118


def _untie(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _own_dtype(model: ModelFolder) -> torch.dtype:
    """The number format that the base model names; bfloat16 for one in 4 bits."""
    config = model_config(model.base, model.revision)
    if config.get("quantization_config"):
        return torch.bfloat16
    parts = (config, config.get("text_config") or {})
    name = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "float32")
    dtype: torch.dtype = getattr(torch, str(name).removeprefix("torch."))
    return dtype


def _copy_processing(model: ModelFolder, target: Path) -> None:
    """The tokenizer that ranks, and what else of a processor its base has."""
    own = Path(tokenizer_folder(model))
    if not own.is_dir():  # a name on the hub
        from transformers import AutoProcessor, AutoTokenizer

        (AutoProcessor if model.family == "vision" else AutoTokenizer).from_pretrained(str(own)).save_pretrained(target)
        return
    for name in _PROCESSING:
        source = next((folder / name for folder in (own, Path(model.base)) if (folder / name).is_file()), None)
        if source is not None:
            shutil.copyfile(source, target / name)


def _save_in_8_bits(model: Any, target: Path) -> None:
    """FP8 (E4M3) as llm-compressor's ``FP8_DYNAMIC`` has it: a scale per output channel, activations scaled per token.

    Embeddings, output head, vision tower and the routers of experts stay as they are.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    ignored = ["lm_head", "re:.*visual.*", "re:.*vision.*", "re:.*mlp.gate$"]
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignored))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            low, high = module.weight.aminmax(dim=1, keepdim=True)
            scale, _ = calculate_qparams(low.detach(), high.detach(), module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))
