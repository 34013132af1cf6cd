"""The vLLM engine: exact label scores from few, prefix-cached requests; adapters are served without merging.

One request reads the root of a prompt's trie and, by one forced decoding step, its first inner node. Every other node
is a request that repeats the prompt. It starts as soon as the root is done, ahead of waiting prompts, so that it finds
its prompt in the prefix cache; all of them at the end would make one short step, during which the GPU idles. With 20
candidates in Qwen's digits there are two requests: root and "1", then "2".

A picture is prepared once, by the thread that first encodes a prompt with it, and sent to vLLM's core once. vLLM's own
way, pictures with ids, handles every picture of every request again: 20 ms for a prompt with 20 of them, in the one
thread that feeds the engine. Encoded pictures stay on the GPU, in a cache larger than vLLM's default.
"""

from __future__ import annotations

import os
import queue
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlrank.config import EngineConfig
from vlrank.engines.adapters import check_adapter
from vlrank.engines.failures import root_cause
from vlrank.engines.families import vision_family
from vlrank.engines.models import ModelFolder
from vlrank.engines.resources import EngineDied, gpu_memory, gpu_share, has_gpu, vllm_env
from vlrank.engines.vllm_args import PICTURE_SHARE, scoring_args, without_pattern
from vlrank.prompting.encoding import Encoded, Encoder, Grid
from vlrank.prompting.labels import LabelTrie

Float32 = npt.NDArray[np.float32]

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from vllm.config import VllmConfig

_MAX_IDS = 128  # vLLM's bound on logprob_token_ids
_PICTURE_BATCH = 16384  # tokens that the vision tower makes at a time; 65,536 were too many for 80 GB beside the rest


@dataclass(frozen=True, slots=True)
class Read:
    """One request: the prompt, ``path``, and the nodes whose choices it reveals.

    Attributes:
        path: Label tokens appended to the prompt.
        nodes: Indices into the trie's nodes: the one at ``path`` and, where ``forced`` is set, the one after it.
        forced: Token decoded after ``path`` so that the second node is seen too.
    """

    path: tuple[int, ...]
    nodes: tuple[int, ...]
    forced: int | None


@lru_cache(maxsize=512)
def plan_reads(trie: LabelTrie) -> tuple[Read, ...]:
    """The fewest requests that show every node, the one that fills the prefix cache first."""
    left = dict(enumerate(trie.nodes))
    reads = []
    while left:
        index, node = next(iter(left.items()))
        del left[index]
        child = next((i for i, n in left.items() if n.path[:-1] == node.path), None)
        if child is None or len({*node.choices, *left[child].choices}) > _MAX_IDS:
            reads.append(Read(node.path, (index,), None))
        else:
            reads.append(Read(node.path, (index, child), left[child].path[-1]))
            del left[child]
    return tuple(reads)


@dataclass(slots=True, eq=False)
class _Score:
    """A prompt on its way through the engine."""

    ids: Sequence[int]
    pictures: tuple[_Picture, ...]
    trie: LabelTrie
    future: Future[Float32]
    flat: Float32
    waiting: int


@dataclass(slots=True)
class _Work:
    """What the driver has to do.

    Attributes:
        waiting: Prompts of which nothing has been sent.
        running: Requests by name.
        unresolved: Prompts that are waiting, in flight, or in no container when something raises.
        count: Requests so far, which name the next one.
        closing: No more prompts will come.
    """

    waiting: deque[_Score] = field(default_factory=deque)
    running: dict[str, tuple[_Score, Read]] = field(default_factory=dict)
    unresolved: set[_Score] = field(default_factory=set)
    count: int = 0
    closing: bool = False

    @property
    def in_flight(self) -> int:
        """Prompts that have been sent and not answered."""
        return len(self.unresolved) - len(self.waiting)

    def accept(self, job: _Score) -> None:
        """Put a prompt into the queue."""
        self.unresolved.add(job)
        job.future.add_done_callback(lambda _: self.unresolved.discard(job))
        self.waiting.append(job)


@dataclass(slots=True)
class _Picture:
    """A picture of one prompt.

    Attributes:
        name: Its identity in vLLM's caches.
        offset: Of its first placeholder among the prompt's tokens.
        length: Placeholders.
        load: Gives what the core takes; called where the core does not have the picture.
        item: What ``load`` gave, if the core was without it when the prompt was submitted.
    """

    name: str
    offset: int
    length: int
    load: Callable[[], Any]
    item: Any


class VllmScorer:
    """vLLM's ``LLMEngine`` in this process (its core runs in a child process), driven by one thread.

    All methods may be called from several threads at once; their requests share the engine's batches, so encoding the
    next prompts overlaps with scoring these.

    Args:
        model: What to load.
        config: Memory, precision and further arguments of vLLM.
        in_flight: Prompts handed to vLLM at a time: enough to fill its batches, few enough that a prompt is still in
            the prefix cache when the requests for its other nodes come.

    Raises:
        UserError: vLLM does not start, or does not serve the model's adapter.
    """

    callers = 4

    def __init__(self, model: ModelFolder, config: EngineConfig, in_flight: int = 128) -> None:
        from vlrank.compat import patch_torchvision

        patch_torchvision()
        on_gpu = has_gpu()
        os.environ.update(vllm_env(on_gpu))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        check_adapter(model, "vllm")
        self.in_flight = in_flight
        kwargs = scoring_args(model, config, gpu_memory() if on_gpu else None)
        kwargs["model"] = without_pattern(kwargs["model"])
        with root_cause():
            # The context of an `LLM`: large steps, for throughput.
            vllm_config = EngineArgs(**kwargs).create_engine_config(UsageContext.LLM_CLASS)
            pictures = kwargs.get("limit_mm_per_prompt", {}).get("image", 0)
            if pictures and on_gpu:
                _keep_pictures(vllm_config, config)
            self.prepare = _Preparer(vllm_config) if pictures else None
            self.vllm = LLMEngine.from_vllm_config(vllm_config, UsageContext.LLM_CLASS, disable_log_stats=True)
        self.lora = LoRARequest("reranker", 1, model.path) if model.is_adapter else None
        self.requests = self.prompt_tokens = self.cached_tokens = 0
        self._inbox: queue.SimpleQueue[_Score | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._drive, name="vllm-driver", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="vllm-watch", daemon=True).start()

    def score_labels(self, encoder: Encoder, requests: Sequence[Encoded]) -> list[Float32 | Exception]:
        """See `scoring.LabelScorer`.

        Raises:
            EngineDied: as everything that waits for this engine does from then on.
        """
        futures = [self.submit(encoder, encoded) for encoded in requests]
        return [_outcome(future) for future in futures]

    def submit(self, encoder: Encoder, encoded: Encoded) -> Future[Float32]:
        """Queue one prompt; the future holds float32 [N]."""
        future: Future[Float32] = Future()
        if not encoded.trie.nodes:  # one candidate: nothing to ask
            future.set_result(encoded.trie.log_probs(np.zeros(0, dtype=np.float32)))
            return future
        try:
            pictures = tuple(self._pictures(encoder, encoded))
        except OSError as error:
            future.set_exception(error)
            return future
        flat = np.zeros(len(encoded.trie.flat), dtype=np.float32)
        self._inbox.put(_Score(encoded.ids, pictures, encoded.trie, future, flat, len(plan_reads(encoded.trie))))
        return future

    def close(self) -> None:
        """Stop the driver and vLLM's processes."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()
        self.vllm.engine_core.shutdown()

    def _pictures(self, encoder: Encoder, encoded: Encoded) -> Iterator[_Picture]:
        position = 0
        for grid, path in zip(encoded.grids, encoded.image_paths, strict=True):
            assert encoder.image_token_id is not None
            assert self.prepare is not None
            position = encoded.ids.index(encoder.image_token_id, position)
            name = f"{path}@{encoder.ranking.max_image_pixels}"
            load, length = partial(self.prepare, encoder, path), encoder.visual_tokens(grid)
            yield _Picture(name, position, length, load, None if self._in_core(name) else load())
            position += length

    def _in_core(self, name: str) -> bool:
        cache = self.vllm.renderer.mm_processor_cache
        return cache is not None and cache.is_cached_item(name)

    def _input(self, job: _Score, read: Read) -> dict[str, Any]:
        """What `LLMEngine.add_request` takes for a prompt followed by the read's path. The caller must send it next.

        Raises:
            ValueError: the prompt, or a picture, is larger than the engine was started for.
        """
        ids, engine = [*job.ids, *read.path], self.vllm
        # vLLM would answer a prompt that leaves no room for all nodes with fewer of them; and one that is too long it
        # would refuse only after the cache here has noted pictures that its core then never gets.
        longest = engine.vllm_config.model_config.max_model_len - len(read.nodes)
        if len(ids) > longest:
            raise ValueError(f"the prompt has {len(ids)} tokens, the engine takes at most {longest}")
        if not job.pictures:
            return {"prompt_token_ids": ids}
        from vllm.multimodal.inputs import PlaceholderRange

        largest, room = max(p.length for p in job.pictures), engine.input_processor.mm_encoder_cache_size
        if largest > room:
            raise ValueError(f"a picture takes {largest} tokens, the engine {room}; lower max_image_pixels")
        for picture in job.pictures:  # before the cache changes: the file may be gone
            if picture.item is None and not self._in_core(picture.name):
                picture.item = picture.load()
        items = [picture.item for picture in job.pictures]
        if (cache := engine.renderer.mm_processor_cache) is not None:
            # Touched first, as in the core: both caches evict the same pictures, and none of this prompt's.
            for picture in job.pictures:
                cache.touch_sender_cache_item(picture.name)
            for i, picture in enumerate(job.pictures):
                sent = None if cache.is_cached_item(picture.name) else (picture.item or picture.load(), ())
                items[i] = cache.get_and_update_item(sent, picture.name)[0]
        return {
            "type": "multimodal",
            "prompt_token_ids": ids,
            "mm_kwargs": {"image": items},
            "mm_hashes": {"image": [picture.name for picture in job.pictures]},
            "mm_placeholders": {"image": [PlaceholderRange(p.offset, p.length) for p in job.pictures]},
        }

    def _watch(self) -> None:
        """Wake the driver where the core was killed: vLLM notices, but goes on waiting for an answer."""
        core = self.vllm.engine_core
        while not core.resources.engine_dead:
            self._thread.join(1)
            if not self._thread.is_alive():
                return
        core.outputs_queue.put(EngineDied("its process has ended"))

    # ---- the driver --------------------------------------------------------------------------------------------------

    def _drive(self) -> None:
        """Feed and step vLLM until `close`; the only thread that touches it."""
        work = _Work()
        try:
            while not (work.closing and not work.waiting and not work.running):
                self._accept(work)
                while work.waiting and work.in_flight < self.in_flight:
                    job = work.waiting.popleft()
                    self._send(work, job, plan_reads(job.trie)[0])
                if work.running:
                    for output in self.vllm.step():
                        if output.finished:
                            self._finish(work, output)
        except BaseException as error:  # callers must not wait for answers that will not come
            died = EngineDied(f"vLLM's engine has died: {type(error).__name__}: {error}")
            died.__cause__ = error
            for job in list(work.unresolved):
                job.future.set_exception(died)
            while not work.closing and (late := self._inbox.get()) is not None:
                late.future.set_exception(died)

    def _accept(self, work: _Work) -> None:
        """Take what callers have put into the inbox; wait for it where there is nothing else to do."""
        while True:
            try:
                job = self._inbox.get(block=not (work.waiting or work.running or work.closing))
            except queue.Empty:
                return
            if job is None:
                work.closing = True
            else:
                work.accept(job)

    def _send(self, work: _Work, job: _Score, read: Read) -> None:
        """Give a read to vLLM as a request."""
        from vllm.v1.engine.exceptions import EngineDeadError

        work.count += 1
        name = str(work.count)
        try:
            prompt, params = self._input(job, read), _label_params(job.trie, read)
            further = read is not plan_reads(job.trie)[0]
            self.vllm.add_request(name, prompt, params, lora_request=self.lora, priority=-further)
        except EngineDeadError:
            raise
        except Exception as error:  # too long, unreadable picture, ...: this prompt's own fault
            if not job.future.done():
                job.future.set_exception(error)
            return
        work.running[name] = (job, read)

    def _finish(self, work: _Work, output: Any) -> None:
        """Take a request's answer; the first one of a prompt is followed by its further reads."""
        job, read = work.running.pop(output.request_id)
        self.requests += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens or 0
        if job.future.done():  # another of its reads has failed
            return
        try:
            _store(job, read, output)
        except ValueError as error:
            job.future.set_exception(error)
            return
        job.waiting -= 1
        reads = plan_reads(job.trie)
        if read is reads[0]:
            for more in reads[1:]:
                self._send(work, job, more)
        if job.waiting == 0:
            job.future.set_result(job.trie.log_probs(job.flat))


@lru_cache(maxsize=512)
def _label_params(trie: LabelTrie, read: Read) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=len(read.nodes),
        temperature=0.0,
        logprob_token_ids=sorted({token for index in read.nodes for token in trie.nodes[index].choices}),
        allowed_token_ids=None if read.forced is None else [read.forced],  # leaves the logprobs as they are
        ignore_eos=True,
        detokenize=False,
    )


def _keep_pictures(vllm_config: VllmConfig, config: EngineConfig) -> None:
    """Room for encoded pictures on the GPU: vLLM's own is one step's tokens, a few hundred pictures."""
    model = vllm_config.model_config.hf_config
    width = vision_family(model).width(model.vision_config)
    share = PICTURE_SHARE * gpu_share(config)
    tokens = int(share * gpu_memory()) // (2 * width)
    scheduler = vllm_config.scheduler_config
    scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, tokens)
    scheduler.max_num_encoder_input_tokens = min(scheduler.max_num_encoder_input_tokens, _PICTURE_BATCH)


class _Preparer:
    """Makes what this version of vLLM's core takes from a picture's file.

    vLLM's own renderer makes one sample per picture size, whose pixels are then replaced. Where the renderer's pixels
    differ from those of `Encoder`, it prepares every picture.

    Args:
        vllm_config: The configuration of the engine.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        import PIL.Image
        from vllm.renderers import renderer_from_config

        config, model = copy(vllm_config), copy(vllm_config.model_config)
        model.multimodal_config = copy(model.multimodal_config)
        model.multimodal_config.mm_processor_cache_gb = 0
        model.multimodal_config.mm_processor_kwargs = {"do_resize": False}  # they have the size of their grids
        config.model_config = model
        self.model_config, self.renderer, self.lock = model, renderer_from_config(config), threading.Lock()
        self.ids = self.renderer.get_tokenizer().convert_tokens_to_ids(
            ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
        )
        self.forms: dict[Grid, Any] = {}
        # The first picture makes vLLM load its processors, 8 to 20 s: a part of the engine's start.
        vision = model.hf_config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        self._rendered(PIL.Image.new("RGB", (side, side)))

    def __call__(self, encoder: Encoder, path: str) -> Any:
        """A ``MultiModalKwargsItem``.

        Raises:
            OSError: the picture cannot be read.
        """
        grid = encoder.grid(path)
        if (form := self.forms.get(grid)) is None:
            with self.lock:
                item = self._rendered(encoder.picture(path))
            alike = self._alike(item["pixel_values"].data, self._pixels(encoder, path, item))
            if not alike:
                warnings.warn(
                    "vLLM's pixels are not vlrank's: its slower renderer prepares every picture", stacklevel=2
                )
            self.forms[grid] = item if alike else ()
            return item
        if not form:
            with self.lock:
                return self._rendered(encoder.picture(path))
        item = copy(form)  # a shallow copy: the next line replaces one entry of this dictionary
        item["pixel_values"] = replace(form["pixel_values"], data=self._pixels(encoder, path, form))
        return item

    def _rendered(self, picture: Image) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        prompt = {"prompt_token_ids": self.ids, "multi_modal_data": {"image": [picture]}}
        (rendered,) = self.renderer.render_cmpl([parse_model_prompt(self.model_config, prompt)])
        return rendered["mm_kwargs"]["image"][0]

    @staticmethod
    def _pixels(encoder: Encoder, path: str, form: Any) -> torch.Tensor:
        import torch

        dtype = form["pixel_values"].data.dtype
        patches = encoder.patches(path)
        return torch.from_numpy(patches if dtype == torch.uint8 else encoder.normalised(patches)).to(dtype)

    @staticmethod
    def _alike(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
        # bfloat16 keeps eight bits.
        return theirs.shape == ours.shape and bool(((theirs.float() - ours.float()).abs() <= 0.02).all())


def _store(job: _Score, read: Read, output: Any) -> None:
    """Note what a read has shown.

    Raises:
        ValueError: vLLM has ended it early.
    """
    answer = output.outputs[0]
    steps = answer.logprobs or ()
    if len(steps) != len(read.nodes):
        raise ValueError(
            f"vLLM answered {len(steps)} of {len(read.nodes)} tokens (finish reason {answer.finish_reason})"
        )
    for index, step in zip(read.nodes, steps, strict=True):
        for at, (node, token) in enumerate(job.trie.flat):
            if node == index:
                job.flat[at] = step[token].logprob


def _outcome(future: Future[Any]) -> Any:
    error = future.exception()
    if isinstance(error, EngineDied):  # `_drive` has ended
        raise error
    return error if error is not None else future.result()
