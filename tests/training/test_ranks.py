"""Several processes learn what one learns, whether weights are whole or sharded and embeddings tied or not.

What a user would lose: a run on two GPUs that trains another model than the one on one GPU, or a checkpoint in which
the output head is not the one that was trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Program
from vlrank.config import TrainConfig
from vlrank.demo.base_models import save_model

Make = Callable[..., TrainConfig]


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


def trained(config: TrainConfig, world: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Losses and metrics of a run, and the weights of its checkpoint as they are in the file."""
    Path(config.out).mkdir()
    file = Path(config.out) / "settings.json"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    ranks = [Program(sys.executable, "-m", "tests.training.rank", i, world, file) for i in range(world)]
    try:
        for program in ranks:
            program.finish(0)
    finally:
        for program in ranks:
            program.kill()
    found = json.loads((Path(config.out) / "found.json").read_text(encoding="utf-8"))
    return found, load_file(Path(config.out) / "last" / "model.safetensors")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base_model(request: pytest.FixtureRequest, tiny_text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_of(tmp_path_factory.mktemp("base") / "model", tiny_text_model, tied=request.param)


def test_two_ranks_learn_what_one_learns(base_model: str, settings: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def run(name: str, world: int, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        common = {"method": "full", "epochs": 1, "lr": 1e-4, "negatives": 3, "val_users": 8, "model": base_model}
        config = settings(
            "semantic_summary_small", out=tmp_path / name, workers=world, micro_batch_size=3, **common, **changes
        )
        return trained(config, world)

    expected, weights = run("one", 1)
    tied = "lm_head.weight" not in weights
    assert tied == json.loads((Path(base_model) / "config.json").read_text())["tie_word_embeddings"]
    for parallel in ("ddp", "fsdp2"):
        found, others = run(parallel, 2, parallel=parallel)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), parallel
        assert found["ndcg"] == pytest.approx(expected["ndcg"]), parallel
        if parallel == "ddp":
            assert found["gradient_as_bucket_view"]
            assert not found["find_unused_parameters"]
        else:
            assert found["prefetched"] == [1, 1, 0]
            assert found["reshards"] == [False, False, False]
        assert others.keys() == weights.keys(), parallel
        for name, weight in weights.items():
            torch.testing.assert_close(others[name].float(), weight, rtol=1e-4, atol=2e-5, msg=f"{parallel} {name}")
        model, missing = AutoModelForCausalLM.from_pretrained(tmp_path / parallel / "last", output_loading_info=True)
        assert not missing["missing_keys"]
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        torch.testing.assert_close(
            model.lm_head.weight.float(), others["model.embed_tokens.weight" if tied else "lm_head.weight"]
        )
