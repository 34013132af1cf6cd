"""A pass of the packed engine by the length of its row: launched step by step, and as a CUDA graph.

    python bench/passes.py --model MODELS/qwen3-0.6b [--fp8] --out passes.json

For every length: milliseconds that the CPU takes to launch a pass and milliseconds until it is done, for a row full of
prompts of 650 tokens; whether three prompts get the same bits as in the longest row; whether the graph gives those of
the pass that is launched step by step. Weights are random, in the model's real shape.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from generate import machine

LENGTHS = (65536, 2048, 4096, 8192, 16384, 32768)
PROMPT = 650
PASSES = 5


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with the configuration of a text model")
    parser.add_argument("--fp8", action="store_true", help="products in 8 bits")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="the first one is compared with")
    parser.add_argument("--out", type=Path, default=Path("passes.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU: nothing is launched")
    report: dict[str, Any] = {"model": options.model.name, "fp8": options.fp8, "machine": machine(), "lengths": []}
    for result in measure(options):
        report["lengths"].append(result)
        print(json.dumps(result), flush=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> Any:
    """A dictionary per length."""
    from vlrank.cuda_graphs import CudaGraphs
    from vlrank.engines.compiled import keep_compiled
    from vlrank.engines.packed import row_reads
    from vlrank.engines.packed_attention import kernel_for
    from vlrank.engines.packed_graphs import RowPasses
    from vlrank.engines.packed_rows import PackedRow

    keep_compiled()
    model = drawn_model(options.model, options.fp8)
    kernel = kernel_for(*model.sizes[:3], model.device, model.dtype)
    stepwise, recorded = RowPasses(model, kernel), RowPasses(model, kernel, CudaGraphs())
    few = [drawn_prompt(n, len(model.embeddings), n) for n in (600, 500, 700)]
    reads = sum(prompt.reads for prompt in few)
    expected = stepwise(PackedRow(few, options.lengths[0], row_reads(options.lengths[0])))[:reads]
    for length in options.lengths:
        row = PackedRow(few, length, row_reads(length))
        given = stepwise(row)[:reads]
        recorded(row)  # the first one is launched step by step
        replayed = recorded(row)[:reads]
        many = [drawn_prompt(PROMPT, len(model.embeddings), i) for i in range(length // (PROMPT + 10))]
        full = PackedRow(many, length, row_reads(length))
        yield {
            "tokens": length,
            "same_bits_as_longest": torch.equal(given, expected),
            "graph_has_same_bits": torch.equal(replayed, given),
            "step_by_step_ms": timed(lambda row=full: stepwise(row)),  # type: ignore[misc]
            "graph_ms": timed(lambda row=full: recorded(row)),  # type: ignore[misc]
        }


def drawn_model(folder: Path, fp8: bool) -> Any:
    """Random weights on the GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from vlrank.engines.packed_model import PackedModel, use_kernels

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=generator)
    packed = PackedModel.of(model)
    packed = packed.float8() if fp8 else packed
    use_kernels(packed)
    return packed


def drawn_prompt(size: int, vocabulary: int, seed: int) -> Any:
    """A prompt of random tokens with the numbers 1 to 20 at its end."""
    from vlrank.engines.packed_rows import PromptTokens
    from vlrank.prompting.labels import LabelTrie

    trie = LabelTrie(tuple((*(int(digit) + 15 for digit in str(n)), 9) for n in range(1, 21)))
    ids = np.random.default_rng(seed).integers(0, vocabulary, size)
    return PromptTokens(ids, np.tile(np.arange(size), (3, 1)), trie)


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a pass: until it is launched, and until it is done."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    began = time.monotonic()
    for _ in range(PASSES):
        run()
    launched = time.monotonic() - began
    torch.cuda.synchronize()
    done = time.monotonic() - began
    return {"launched": round(1e3 * launched / PASSES, 2), "done": round(1e3 * done / PASSES, 2)}


if __name__ == "__main__":
    main()
