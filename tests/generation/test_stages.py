"""What happens to one row before and after the engine."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from vlrank.config import EngineConfig
from vlrank.data.picture import PictureBroken
from vlrank.engines import resources, vllm_args
from vlrank.engines.resources import RESTARTS, engine_name, weights_bytes
from vlrank.engines.vllm_args import cache_plan
from vlrank.errors import UserError
from vlrank.generation import writing
from vlrank.generation.job import DATA, FAILED, Job, judge, load_picture, load_processor, longest_row, prepare
from vlrank.generation.prompts import load_prompt
from vlrank.generation.writers.transformers import _gpu_is_lost
from vlrank.generation.writing import build, engine_args, engine_lines

CAPTION = Job(prompt=load_prompt("caption/v1", "caption"), model="m", model_name="m")
SUMMARY = dataclasses.replace(CAPTION, prompt=load_prompt("semantic_summary/v1", "semantic_summary"))


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (640, 320), **options: Any) -> str:
    Image.new(
        mode, size, 0 if mode in ("L", "P", "1", "LA") else tuple([200] * len(Image.new(mode, (1, 1)).getbands()))
    ).save(path, **options)
    return str(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_pictures_of_every_kind_become_rgb_of_the_asked_size(tmp_path: Path, mode: str) -> None:
    loaded = load_picture(picture(tmp_path / "a.png", mode), 448)
    assert (loaded.mode, loaded.size) == ("RGB", (448, 224))


def test_small_pictures_are_not_blown_up(tmp_path: Path) -> None:
    assert load_picture(picture(tmp_path / "a.jpg", size=(100, 60)), 448).size == (100, 60)


def test_a_transparent_background_is_white_not_black(tmp_path: Path) -> None:
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert np.asarray(load_picture(str(tmp_path / "a.png"), 448)).min() == 255


def test_a_photo_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_picture(picture(tmp_path / "a.jpg", exif=exif), 448).size == (224, 448)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"0" * 50])
def test_files_that_are_no_pictures_are_named_broken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(PictureBroken, match=r"a\.jpg"):
        load_picture(str(tmp_path / "a.jpg"), 448)


def test_a_truncated_download_is_named_broken(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    with pytest.raises(PictureBroken, match="truncated"):
        load_picture(str(tmp_path / "a.jpg"), 448)


def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run would end with any that is not foreseen; full memory is not the picture's fault."""

    def load(error: Exception) -> None:
        def raising(_: object) -> None:
            raise error

        monkeypatch.setattr("vlrank.data.picture.to_rgb", raising)
        load_picture(picture(tmp_path / "a.png"), 448)

    with pytest.raises(PictureBroken, match="unpack requires"):
        load(struct.error("unpack requires a buffer of 12 bytes"))
    with pytest.raises(MemoryError):
        load(MemoryError())


def row(**changes: Any) -> dict[str, Any]:
    return {"item_id": 3, "input_hash": "h", "text": "Red mug", "picture": None, "picture_hash": "", **changes}


def test_a_missing_picture_says_so_and_asks_nothing() -> None:
    inputs = prepare(row(picture="/nowhere/a.jpg"), CAPTION)
    assert inputs[FAILED].startswith("PictureMissing: /nowhere/a.jpg")
    assert inputs["prompt"] is None


def test_an_item_with_nothing_to_describe_is_not_asked() -> None:
    assert prepare(row(text="  "), SUMMARY)[FAILED].startswith("NothingToDescribe")


def test_prompt_and_picture_travel_together(tmp_path: Path, tiny_vision_model: Path) -> None:
    job = dataclasses.replace(CAPTION, model=str(tiny_vision_model))
    inputs = prepare(row(picture=picture(tmp_path / "a.jpg"), picture_hash="cafe"), job)
    assert inputs[FAILED] == ""
    assert inputs["prompt"].count("<|image_pad|>") == 1
    assert "Describe the product" in inputs["prompt"]
    assert inputs["multimodal_data"]["image"].size == (448, 224)
    assert inputs["multimodal_uuids"] == {"image": "cafe-448"}
    assert inputs["sampling_params"] == {"temperature": 0.0, "max_tokens": 96}


@pytest.fixture(scope="module")
def seeing_model(tiny_vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger pictures take more tokens, as in Qwen3-VL."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("models") / "vision"
    shutil.copytree(tiny_vision_model, folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 128 * 128, "longest_edge": 4096 * 4096}
    processor.save_pretrained(folder)
    return folder


def test_a_row_that_is_longer_than_the_engine_takes_goes_to_quarantine(tmp_path: Path, seeing_model: Path) -> None:
    """vLLM would refuse it with an error of its own, or cut the answer short without a word."""
    job = dataclasses.replace(SUMMARY, model=str(seeing_model))
    rows = [row(text="mug " * n) for n in (1, 50)]
    rows += [row(picture=picture(tmp_path / f"{side}.png", size=(side, side))) for side in (64, 448)]
    short, long, small, large = (prepare(one, dataclasses.replace(job, max_model_len=10_000)) for one in rows)
    for fits, exceeds in ((short, long), (small, large)):
        processor = load_processor(str(seeing_model), None)
        pictures = [fits["multimodal_data"]["image"]] if fits["with_image"] else None
        tokens = len(processor(text=[fits["prompt"]], images=pictures)["input_ids"][0])
        room = dataclasses.replace(job, max_model_len=tokens + job.max_tokens)
        inputs = {FAILED: "", "prompt": fits["prompt"]}
        assert inputs.items() <= prepare(rows[(short, long, small, large).index(fits)], room).items()
        failed = prepare(rows[(short, long, small, large).index(exceeds)], room)[FAILED]
        assert failed.startswith("PromptTooLong: ")
        assert "engine.max_model_len" in failed


@pytest.mark.parametrize("side", [32, 100, 448])
def test_no_row_of_a_job_is_longer_than_its_bound(tmp_path: Path, seeing_model: Path, side: int) -> None:
    job = dataclasses.replace(SUMMARY, model=str(seeing_model), image_side=side)
    texts = ["Red mug", "\u7ea2\u8272\u9a6c\u514b\u676f " * 30, "x7-\u00e9<|im_end|>" * 40]
    plain = [text.replace("<|", "< |") for text in texts]
    bound = longest_row(job, plain[:1], max(len(text.encode()) for text in plain), pictures=True)
    assert longest_row(job, plain, 0, pictures=True).total <= bound.total
    exact = dataclasses.replace(job, max_model_len=longest_row(job, plain, 0, pictures=True).total)
    for text in texts:
        for width in (4, 30, side, 600):
            shown = picture(tmp_path / f"{width}.png", size=(width, 600))
            assert prepare(row(text=text, picture=shown), exact)[FAILED] == ""


def test_an_answer_that_ends_at_the_engines_limit_is_truncated() -> None:
    (cut,) = judged(dataclasses.replace(CAPTION, max_model_len=12), answered("A red mug for"))
    assert cut["error_type"] == "Quality.truncated"


def test_a_summary_without_picture_is_made_from_the_text(tiny_vision_model: Path) -> None:
    inputs = prepare(row(), dataclasses.replace(SUMMARY, model=str(tiny_vision_model)))
    assert "Red mug" in inputs["prompt"]
    assert "<|image_pad|>" not in inputs["prompt"]
    assert "multimodal_data" not in inputs


def test_another_attempt_samples_with_another_seed_that_depends_on_the_item_alone(tiny_text_model: Path) -> None:
    def sampling(attempt: int, item_id: int = 3, temperature: float = 0.0) -> dict[str, Any]:
        job = dataclasses.replace(
            SUMMARY, model=str(tiny_text_model), sees=False, attempt=attempt, temperature=temperature
        )
        return prepare(row(item_id=item_id), job)["sampling_params"]

    assert "seed" not in sampling(0)
    assert sampling(1)["temperature"] > 0
    assert sampling(1) == sampling(1)
    seeds = {
        sampling(1)["seed"],
        sampling(2)["seed"],
        sampling(1, item_id=4)["seed"],
        sampling(0, temperature=1.0)["seed"],
    }
    assert len(seeds) == 4


def answered(text: str, tokens: int = 5, **changes: Any) -> dict[str, Any]:
    return row(generated_text=text, num_generated_tokens=tokens, num_input_tokens=7, time_taken_llm=0.5, **changes) | {
        FAILED: changes.get(FAILED, "")
    }


def judged(job: Job, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    data = np.empty(len(rows), dtype=object)
    data[:] = rows
    columns = judge({DATA: data}, job)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_good_texts_failed_rows_and_rejected_ones_are_told_apart() -> None:
    first = dataclasses.replace(CAPTION, last=False)
    good, failed, rejected = judged(
        first,
        answered(" A red\n mug. "),
        answered("", **{FAILED: "ValueError: aspect ratio: 300"}),
        answered("I'm sorry, no."),
    )
    assert (good["text"], good["error_type"], good["tokens_out"]) == ("A red mug.", "", 5)
    assert (failed["error_type"], failed["error"], failed["retry"]) == ("ValueError", "aspect ratio: 300", False)
    assert (rejected["error_type"], rejected["retry"]) == ("Quality.refusal", True)
    (last,) = judged(CAPTION, answered("I'm sorry, no."))
    assert not last["retry"], "the last attempt ends in quarantine"


def test_half_a_character_at_the_end_does_not_tell_engines_apart() -> None:
    transformers, vllm = judged(
        dataclasses.replace(CAPTION, gate=False), answered("A mug \ufffd\ufffd"), answered("A mug ")
    )
    assert transformers["text"] == vllm["text"] == "A mug"


def test_the_gate_can_be_switched_off() -> None:
    (kept,) = judged(dataclasses.replace(CAPTION, gate=False), answered("", tokens=96))
    assert kept["error_type"] == ""


def test_structured_output_yields_the_asked_field() -> None:
    schema = {"type": "object", "properties": {"summary": {"type": "string"}}}
    prompt = dataclasses.replace(SUMMARY.prompt, json_schema=schema, json_field="summary")
    job = dataclasses.replace(SUMMARY, prompt=prompt)
    good, bad = judged(job, answered('{"summary": "A red mug for coffee drinkers."}'), answered('{"summary": '))
    assert good["text"] == "A red mug for coffee drinkers."
    assert bad["error_type"] == "Quality.not_json"


GIB = 2**30
SIZED = dataclasses.replace(CAPTION, max_model_len=512)


def test_engines_get_what_the_config_says_and_own_arguments_win() -> None:
    engine = EngineConfig(quantization="fp8", engine_kwargs={"seed": 7})
    args = engine_args(dataclasses.replace(SIZED, revision="abc"), engine, memory=80 * GIB)
    expected = {"max_model_len": 512, "quantization": "fp8", "seed": 7, "revision": "abc", "enforce_eager": False}
    assert expected.items() <= args.items()
    assert args["limit_mm_per_prompt"] == {"image": 1, "video": 0}
    assert engine_args(SIZED, EngineConfig(), memory=None)["enforce_eager"] is True


def test_gated_delta_layers_compute_in_bfloat16_on_a_cpu(tmp_path: Path) -> None:
    """vLLM's kernel for them takes nothing else there, and an engine would die at its first prompt."""
    job = dataclasses.replace(SIZED, model=str(tmp_path))
    for kinds, dtype in ((["full_attention"], "float32"), (["linear_attention", "full_attention"], "bfloat16")):
        text = {"layer_types": kinds, "max_position_embeddings": 4096}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
        assert engine_args(job, EngineConfig(), memory=None)["dtype"] == dtype
        assert engine_args(job, EngineConfig(dtype="float16"), memory=None)["dtype"] == "float16"
        assert engine_args(job, EngineConfig(), memory=80 * GIB)["dtype"] == "auto"


def test_engines_on_half_a_gpu_take_half_its_memory() -> None:
    engine = EngineConfig(gpus=0.5, engine_kwargs={"kv_cache_memory_bytes": GIB})
    assert engine_args(SIZED, engine, memory=80 * GIB)["gpu_memory_utilization"] == pytest.approx(0.45)


def test_engines_side_by_side_do_not_measure_what_is_free(tmp_path: Path) -> None:
    """Each would count the other's memory as taken while both start, and die or leave most of the GPU unused."""
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    job = dataclasses.replace(SIZED, model=str(tmp_path))
    args = engine_args(job, EngineConfig(gpus=0.5), memory=80 * GIB)
    assert args["kv_cache_memory_bytes"] == int(80 * GIB * 0.45) - 1000 - 3 * GIB
    with pytest.raises(UserError, match=r"engine\.gpus=0\.04: 2\.9 GiB do not hold"):
        engine_args(job, EngineConfig(gpus=0.04), memory=80 * GIB)


def test_the_plan_says_what_an_engines_cache_holds(shared_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-VL-2B: 28 layers of 8 key and value heads of 128 elements are 112 KiB a token."""
    monkeypatch.setattr(vllm_args, "weights_bytes", lambda model: 4 * GIB)
    job = dataclasses.replace(SIZED, model=str(shared_models / "qwen3-vl-2b"))

    def plan(engine: EngineConfig, memory: int | None) -> str:
        return cache_plan(job.folder, engine_args(job, engine, memory), memory)

    card = plan(EngineConfig(), 24 * GIB)
    assert card == "14.6 GiB, 136,689 tokens: 266 of the longest rows at once (at most 512 rows)"
    share = EngineConfig(gpus=0.25, engine_kwargs={"kv_cache_memory_bytes": 7 * GIB})
    assert plan(share, 80 * GIB).startswith("7.0 GiB, 65,536 tokens: 128 of the longest rows")
    assert plan(EngineConfig(tensor_parallel_size=2), 24 * GIB).startswith("16.6 GiB, 310,827 tokens")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert plan(EngineConfig(), None) == "2.0 GiB, 9,362 tokens: 18 of the longest rows at once"


def test_an_adapter_is_served_with_the_smallest_rank_that_fits(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12}))
    args = engine_args(dataclasses.replace(SIZED, adapter=str(tmp_path)), EngineConfig(), memory=80 * GIB)
    assert (args["enable_lora"], args["max_lora_rank"]) == (True, 16)


class Steps:
    """As much of a Ray dataset as writers need; notes their actors."""

    def __init__(self) -> None:
        self.actors: list[dict[str, Any]] = []

    def map(self, work: Any, **_: Any) -> Steps:
        return self

    def map_batches(self, work: Any, **options: Any) -> Steps:
        if isinstance(work, type):
            self.actors.append({"work": work, **options})
        return self

    map_batches_internal = map_batches  # what `ray.data.llm` calls


@pytest.mark.parametrize("engine", [{"name": "transformers"}, {"name": "vllm"}, {"name": "vllm", "rendered": 2}])
def test_no_engine_is_restarted_for_ever(
    monkeypatch: pytest.MonkeyPatch, tiny_vision_model: Path, engine: dict[str, Any]
) -> None:
    """`ray.data.llm` leaves Ray Data's default, which has no bound: a run whose engine always dies would never end."""
    import ray

    if engine["name"] == "vllm":
        pytest.importorskip("vllm")
        telemetry = "ray.llm._internal.batch.processor.vllm_engine_proc.get_or_create_telemetry_agent"
        monkeypatch.setattr(telemetry, MagicMock())
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(resources, "cluster_gpus", lambda: 0.0)
    job = dataclasses.replace(SIZED, model=str(tiny_vision_model))
    steps, workers = Steps(), engine.pop("rendered", 0)
    build(steps, job, EngineConfig(cpus=3, **engine), shard_rows=8, render_workers=workers)  # type: ignore[arg-type]
    holder = steps.actors[-1]
    assert len(steps.actors) == 1 + bool(workers)
    assert (holder["num_cpus"], holder["num_gpus"], holder["max_restarts"]) == (3, 0, RESTARTS)


def test_a_gpu_that_the_cluster_lacks_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tiny_vision_model: Path
) -> None:
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(writing, "engine_name", lambda engine: "vllm")
    monkeypatch.setattr(writing, "cluster_gpu_memory", lambda gpus: pytest.fail("its task would wait forever"))
    with pytest.raises(UserError, match="needs 1 GPU, 1 CPU on one node"):
        engine_lines(dataclasses.replace(SIZED, model=str(tiny_vision_model)), EngineConfig(gpus=1))


def test_asking_for_vllm_where_it_is_absent_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engine_name(EngineConfig()) == "transformers"
    with pytest.raises(UserError, match=r"Install it \(.+\)"):
        engine_name(EngineConfig(name="vllm"))


def test_eight_bit_products_are_not_ignored_by_an_engine_without_them() -> None:
    with pytest.raises(UserError, match=r"does not compute engine\.quantization=fp8"):
        engine_name(EngineConfig(name="transformers", quantization="fp8"))


def test_engines_share_a_gpu_with_a_model_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model is one: its weights' size decides how much of the GPU is left for each engine's cache."""
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    files = [
        {"rfilename": "model-1.safetensors", "size": 3_000},
        {"rfilename": "model-2.safetensors", "size": 400},
        {"rfilename": "tokenizer.json", "size": 7},
    ]
    monkeypatch.setattr(
        huggingface_hub, "model_info", lambda name, **_: ModelInfo(id=name, siblings=files, tags=[], downloads=0)
    )
    assert weights_bytes("Qwen/Qwen3-VL-2B-Instruct") == 3_400

    def offline(name: str, **_: Any) -> ModelInfo:
        raise ConnectionError(name)

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    assert weights_bytes("Qwen/Qwen3-VL-2B-Instruct") == 0


def test_a_lost_gpu_is_not_the_rows_fault() -> None:
    """After one failed assertion on the GPU every later row would go to the quarantine, of a run that looks healthy."""
    torch = pytest.importorskip("torch")
    assert _gpu_is_lost(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    assert _gpu_is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert _gpu_is_lost(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"))
    assert not _gpu_is_lost(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    assert not _gpu_is_lost(ValueError("CUDA error in an item's text"))
