"""Several processes learn what one learns, whether weights are whole or sharded and embeddings tied or not.

What a user would lose: a run on two GPUs that trains another model than the one on one GPU, or a checkpoint in which
the output head is not the one that was trained.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import PATIENCE_S
from tests.training.rank import forked
from vlrank.config import TrainConfig
from vlrank.demo.base_models import save_model

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServerContext]:
    """Twenty processes: imports take most of the time of each, and are made once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "vlrank.training.trainer",
            "vlrank.training.worker",
            "torch.distributed.fsdp",
            "transformers.models.qwen3.modeling_qwen3",
            "transformers.models.qwen3_vl.modeling_qwen3_vl",
        ]
    )
    yield context
    # They would live as long as the tests.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def model_of(folder: Path, tokenizer_of: Path, *, tied: bool) -> str:
    """A tiny Qwen3 whose output head is its embedding, or is not."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    if not tied:
        torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    return str(save_model(folder, model, tokenizer))


def trained(
    forks: ForkServerContext, config: TrainConfig, world: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Losses and metrics of a run, and the weights of its checkpoint as they are in the file."""
    Path(config.out).mkdir()
    outputs = [Path(config.out) / f"rank-{i}.log" for i in range(world)]
    ranks = [forks.Process(target=forked, args=(i, world, config, output)) for i, output in enumerate(outputs)]
    for process in ranks:
        process.start()
    try:
        for process, output in zip(ranks, outputs, strict=True):
            process.join(PATIENCE_S)
            assert process.exitcode == 0, f"{process.exitcode}:\n{output.read_text()}"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    found = json.loads((Path(config.out) / "found.json").read_text(encoding="utf-8"))
    return found, load_file(Path(config.out) / "last" / "model.safetensors")


@pytest.mark.parametrize(
    ("mode", "special"),
    [
        ("semantic_summary_small", {"tied": True}),
        ("semantic_summary_small", {"tied": False}),
        ("raw_image", {"train_vision": False}),  # from features of the pictures
        ("raw_image", {"train_vision": True}),
    ],
    ids=str,
)
def test_two_ranks_learn_what_one_learns(
    mode: str,
    special: dict[str, bool],
    forks: ForkServerContext,
    tiny_text_model: Path,
    tiny_vision_model: Path,
    settings: Make,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    base_model, vision = str(tiny_vision_model), mode == "raw_image"
    if not vision:
        base_model = model_of(tmp_path / "base", tiny_text_model, **special)

    def run(name: str, world: int, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        common = {"method": "full", "epochs": 1, "lr": 1e-4, "negatives": 3, "val_users": 8, "model": base_model}
        common |= special if vision else {}
        config = settings(mode, out=tmp_path / name, workers=world, micro_batch_size=3, **common, **changes)
        return trained(forks, config, world)

    expected, weights = run("one", 1)
    learned = [
        name
        for name, weight in load_file(Path(base_model) / "model.safetensors").items()
        if not torch.equal(weight, weights[name])
    ]
    assert any("visual" in name for name in learned) == special.get("train_vision", False)
    tied = "lm_head.weight" not in weights
    assert tied == json.loads((Path(base_model) / "config.json").read_text())["tie_word_embeddings"]
    for parallel in ("ddp", "fsdp2"):
        found, others = run(parallel, 2, parallel=parallel)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), parallel
        assert found["ndcg"] == pytest.approx(expected["ndcg"]), parallel
        if parallel == "ddp":
            assert found["gradient_as_bucket_view"]
            assert found["find_unused_parameters"] == special.get("train_vision", False)
        else:
            assert found["prefetched"] == [1] * (len(found["prefetched"]) - 1) + [0]
            assert not any(found["reshards"])
        assert others.keys() == weights.keys(), parallel
        for name, weight in weights.items():
            torch.testing.assert_close(others[name].float(), weight, rtol=1e-4, atol=2e-5, msg=f"{parallel} {name}")
        kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model, missing = kind.from_pretrained(tmp_path / parallel / "last", output_loading_info=True)
        assert not missing["missing_keys"]
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        embeddings = "model.language_model.embed_tokens.weight" if vision else "model.embed_tokens.weight"
        torch.testing.assert_close(model.lm_head.weight.float(), others[embeddings if tied else "lm_head.weight"])
