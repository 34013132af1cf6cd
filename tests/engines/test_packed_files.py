"""A model read from its files must be, bit by bit, what transformers and PEFT would have loaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.prompting.tokenizers_zoo import ZOO
from vlrank.config import EngineConfig
from vlrank.engines.models import ModelFolder, open_model
from vlrank.engines.packed_files import read_known, remember
from vlrank.engines.packed_layer import Matrix
from vlrank.engines.packed_load import open_packed
from vlrank.engines.packed_model import PackedModel, side_by_side
from vlrank.engines.transformers_scorer import load_model
from vlrank.prompting.encoding import Encoder
from vlrank.prompting.modes import mode_spec

from .brute_force import RANKING, text_items

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(folder: Path) -> ModelFolder:
    mode = "caption" if "vision_config" in json.loads((folder / "config.json").read_text()) else None
    return open_model(folder, mode or "semantic_summary_small")


def is_read(model: ModelFolder, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a folder is read with the same bits as through the libraries, and is read again afterwards."""
    assert read_known(model, dtype, CPU) is None, "nothing is read on trust"
    known = remember(model, PackedModel.of(load_model(model, str(dtype).removeprefix("torch."), "cpu")))
    assert (read_known(model, dtype, CPU) is not None) == known
    return known


def small(kind: str, **options: Any) -> Any:
    """A model of two layers with random weights, biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, vocab_size=len(ZOO["digits"]()), **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    ZOO["digits"]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": False, "attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_models_are_read(kind: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    assert is_read(opened(saved(small(kind, **options), tmp_path / "model", max_shard_size="50KB")), dtype)


def test_the_language_model_of_a_vision_model_is_read(tiny_vision_model: Path) -> None:
    assert is_read(opened(tiny_vision_model))


def adapter(tmp_path: Path, *, base: Any = None, **options: Any) -> ModelFolder:
    from peft import LoraConfig, get_peft_model

    folder = saved(small("qwen3", head_dim=32), tmp_path / "base")
    model = base or load_model(open_model(folder, "semantic_summary_small"), "float32", "cpu")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder)}))
    return open_model(tmp_path / "adapter", "semantic_summary_small")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged_as_from_the_libraries(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    assert is_read(adapter(tmp_path, **options), dtype)


def test_an_adapter_of_other_numbers_is_read_at_once(tmp_path: Path) -> None:
    """The checkpoints of a run have one layout: only the first is compared."""
    model = adapter(tmp_path)
    assert is_read(model)
    file = Path(model.path) / "adapter_model.safetensors"
    changed = {name: 2 * tensor for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    own, loaded = read_known(model, torch.float32, CPU), PackedModel.of(load_model(model, "float32", "cpu"))
    assert own is not None
    torch.testing.assert_close(own.layers[0].qkv.weight, loaded.layers[0].qkv.weight, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}])
def test_adapters_that_are_not_plain_are_left_to_the_libraries(options: dict[str, Any], tmp_path: Path) -> None:
    assert not is_read(adapter(tmp_path, **options))


def test_four_bit_weights_are_read(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = saved(small("qwen3", head_dim=32), tmp_path / "plain")
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=four, dtype=torch.bfloat16)
    folder = opened(saved(model, tmp_path / "four"))
    assert is_read(folder, torch.bfloat16)


def test_scores_are_the_same_and_the_libraries_stay_out(tmp_path: Path) -> None:
    """The second process that ranks with a layout imports neither transformers' models nor PyTorch's compiler."""
    model = adapter(tmp_path)
    encoder = Encoder.load(model.base, mode_spec("semantic_summary_small"), RANKING)
    scorer = open_packed(model, EngineConfig(name="packed"), encoder)
    [expected] = scorer.score_labels(encoder, [encoder.encode(text_items(3, "old"), text_items(12))])
    scorer.close()
    program = """
import sys
from vlrank.config import EngineConfig
from vlrank.engines.models import open_model
from vlrank.reranking.ranker import open_ranker
ranker = open_ranker(open_model(sys.argv[1], "semantic_summary_small"), EngineConfig(), {}, own_process=True)
heavy = [name for name in ("transformers.modeling_utils", "peft", "torch._dynamo", "sympy") if name in sys.modules]
from tests.engines.brute_force import RANKING, text_items
encoder = ranker.prompts.encoder
encoder.ranking = RANKING
[scores] = ranker.engine.score_labels(encoder, [encoder.encode(text_items(3, "old"), text_items(12))])
print(heavy, scores.tolist())
"""
    place = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, model.path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": place},
    )
    assert done.returncode == 0, done.stderr
    heavy, _, scores = done.stdout.strip().splitlines()[-1].partition("] ")
    assert heavy == "["
    np.testing.assert_array_equal(np.asarray(json.loads(scores), dtype=np.float32), expected)


def test_another_engine_gets_the_libraries_back(tmp_path: Path) -> None:
    """A process that was prepared for reading files has to be able to become a vLLM or transformers engine."""
    folder = saved(small("qwen3", head_dim=32), tmp_path / "model")
    program = """
import sys
from vlrank.config import EngineConfig
from vlrank.engines.models import open_model
from vlrank.reranking.ranker import open_ranker
import vlrank.engines.scoring as scoring
scoring.engine_name = lambda config: "transformers"
engine = EngineConfig(quantization="fp8")  # not on a CPU
ranker = open_ranker(open_model(sys.argv[1], "semantic_summary_small"), engine, {}, own_process=True)
from tests.engines.brute_force import RANKING, text_items
import scipy
encoder = ranker.prompts.encoder
encoder.ranking = RANKING
[scores] = ranker.engine.score_labels(encoder, [encoder.encode(text_items(3, "old"), text_items(12))])
print(type(ranker.engine).__name__, len(scores))
"""
    place = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": place},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "TransformersScorer 12"


# ---- what is not known -----------------------------------------------------------------------------------------------


def test_a_layout_with_more_or_less_in_it_is_another_one(tmp_path: Path) -> None:
    folder = saved(small("qwen3", head_dim=32), tmp_path / "model")
    assert is_read(opened(folder))
    shutil.copytree(folder, tmp_path / "more")
    file = tmp_path / "more" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.gate.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    assert read_known(opened(tmp_path / "more"), torch.float32, CPU) is None
    assert not remember(opened(tmp_path / "more"), PackedModel.of(load_model(opened(folder), "float32", "cpu")))
    tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    assert read_known(opened(tmp_path / "more"), torch.float32, CPU) is None
    file.write_bytes(file.read_bytes()[:1000])
    assert read_known(opened(tmp_path / "more"), torch.float32, CPU) is None


def test_other_numbers_than_those_of_the_libraries_are_not_known(tmp_path: Path) -> None:
    model = opened(saved(small("qwen3", head_dim=32), tmp_path / "model"))
    loaded = PackedModel.of(load_model(model, "float32", "cpu"))
    loaded.layers[1].down.weight[0, 0] += 1e-6
    assert not remember(model, loaded)
    assert read_known(model, torch.float32, CPU) is None


@pytest.mark.parametrize(
    "config", [{"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"rms_norm_eps": None}, {"model_type": "gemma3"}]
)
def test_what_is_not_plain_is_not_read(config: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(small("qwen3", head_dim=32), tmp_path / "model")
    model = opened(folder)
    loaded = PackedModel.of(load_model(model, "float32", "cpu"))
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 1e4} | config))
    assert not remember(model, loaded)


def test_a_cache_that_cannot_be_written_is_no_mistake(tmp_path: Path, cache: Path) -> None:
    model = opened(saved(small("qwen3", head_dim=32), tmp_path / "model"))
    cache.write_text("a file where a folder should be")
    assert not remember(model, PackedModel.of(load_model(model, "float32", "cpu")))
    assert read_known(model, torch.float32, CPU) is None


def test_scores_do_not_depend_on_where_a_file_puts_a_matrix() -> None:
    odd = torch.randn(64 * 64 + 1)[1:].view(64, 64)
    assert odd.data_ptr() % 64
    kept = side_by_side([Matrix(odd)]).weight
    assert kept.data_ptr() % 64 == 0
    assert torch.equal(kept, odd)
