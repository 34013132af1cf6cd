"""The plan of requests must show every node of the trie exactly once."""

import glob
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlrank.config import EngineConfig, Mode, RankingConfig
from vlrank.engines.models import ModelFolder
from vlrank.engines.vllm_args import scoring_args, without_pattern
from vlrank.engines.vllm_scorer import Read, plan_reads
from vlrank.prompting.labels import LabelTrie

END = 2


def single_digits(n: int) -> LabelTrie:
    return LabelTrie(tuple((*(10 + int(d) for d in str(i)), END) for i in range(1, n + 1)))


def test_twenty_candidates_take_two_requests() -> None:
    # The root and, by one forced decoding step, node "1"; then node "2", which exists because of "20".
    assert plan_reads(single_digits(20)) == (Read((), (0, 1), 11), Read((12,), (2,), None))
    assert plan_reads(single_digits(9)) == (Read((), (0,), None),)


@given(st.integers(1, 100))
def test_every_node_is_read_once(n: int) -> None:
    trie = single_digits(n)
    reads = plan_reads(trie)
    assert sorted(index for read in reads for index in read.nodes) == list(range(len(trie.nodes)))
    for read in reads:
        assert trie.nodes[read.nodes[0]].path == read.path
        if read.forced is not None:
            assert trie.nodes[read.nodes[1]].path == (*read.path, read.forced)


def test_more_choices_than_vllm_returns_are_asked_separately() -> None:
    # 100 first tokens and 100 other second tokens would be 200 ids in one request; vLLM returns 128.
    labels = [(1000, 2000 + i) for i in range(100)] + [(1001 + i, END) for i in range(99)]
    reads = plan_reads(LabelTrie(tuple(labels)))
    assert [len(read.nodes) for read in reads] == [1, 1]


def test_rerankers_side_by_side_do_not_measure_what_is_free(tmp_path: Path) -> None:
    """Each would count the other's memory as taken while both start; what pictures get is not for the cache."""
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    (tmp_path / "config.json").write_text("{}")

    def cache(gpus: float | None, mode: Mode = "caption", **more: object) -> Any:
        model = ModelFolder(str(tmp_path), str(tmp_path), mode, RankingConfig(), "vision")
        config = EngineConfig(gpus=gpus, gpu_memory_utilization=0.9, engine_kwargs=more)
        return scoring_args(model, config, memory=80 * 2**30).get("kv_cache_memory_bytes")

    taken = 1000 + 3 * 2**30
    assert cache(0.5) == int(80 * 2**30 * 0.45) - taken
    assert cache(0.5, "raw_image") == pytest.approx(80 * 2**30 * 0.45 * 0.9 - taken, abs=1)
    assert cache(None) is cache(1) is None
    assert cache(0.5, kv_cache_memory_bytes=7) == 7


def test_weights_are_found_in_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    """vLLM globs below the model's folder, and found no weights in ``runs/[v2]``."""
    folder = tmp_path / "runs [v2]" / "checkpoint?*"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    seen = without_pattern(str(folder))
    assert glob.glob(os.path.join(seen, "*.safetensors")) == [f"{seen}/model.safetensors"]
    assert without_pattern("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert without_pattern(str(tmp_path)) == str(tmp_path)
