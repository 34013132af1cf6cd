"""The packed engine: label tries of many prompts in one forward pass over packed rows. Nothing is decoded.

Prompts of all callers go into one queue, from which a thread fills rows. On a GPU rows have one length, or one of a few
that were seen to give the same bits, and the next row is launched while one is computed. A prompt's scores depend
neither on its neighbours nor on its place in the row: every product has a shape that was compared, and attention sees
no more than the prompt. On a CPU every row holds one prompt, for the same reason.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from vlrank.cuda_graphs import Record
from vlrank.engines.packed_attention import Context, kernel_for
from vlrank.engines.packed_graphs import Prefixes, RowPasses
from vlrank.engines.packed_model import PackedModel
from vlrank.engines.packed_prefixes import PrefixMemory
from vlrank.engines.packed_rows import Int, PackedRow, PromptTokens
from vlrank.engines.resources import EngineDied
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.prompting.labels import LabelTrie

if TYPE_CHECKING:
    from vlrank.engines.packed_pictures import PictureFeatures

Float32 = npt.NDArray[np.float32]

_SHORTEST_ROW = 4096
_LONG_STEP = 8192  # a prompt longer than a row gets one of the next multiple
_TOKENS_PER_READ = 64  # a GPU's rows have one place to read for so many tokens,
_READS = 1024  # and at least so many, so that the last layer's products have one shape in rows of all usual lengths
_LOOKED_AT = 512  # waiting prompts that may fill a row


@dataclass(eq=False, slots=True)
class _Call:
    """What a caller waits for.

    Attributes:
        left: Its prompts whose rows have not landed.
        landed: All have.
    """

    left: int = 0
    landed: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False, slots=True)
class _Job:
    """A prompt in the queue.

    Attributes:
        body: The part that a row holds.
        prefix: The beginning, computed in another row and shared; None where the body is the whole prompt.
        key: Names the prefix.
        hidden: float32 [reads, hidden] once the row has landed, or the error.
    """

    call: _Call
    encoder: Encoder
    body: PromptTokens
    prefix: PromptTokens | None
    key: bytes
    hidden: Float32 | Exception | None = None


def row_reads(length: int) -> int:
    """Places to read of a row."""
    return max(_READS, length // _TOKENS_PER_READ)


class PackedScorer:
    """A `scoring.LabelScorer` over packed rows; may be called from several threads, which fill rows together.

    Args:
        model: The weights; given up when the scorer is closed.
        row_tokens: Length of a GPU's rows; None gives every prompt a row of its own, without filling.
        record: Makes one launch of a pass, see `cuda_graphs`; None launches every pass step by step.
        prefix_bytes: For the keys and values of prefixes.
        feature_bytes: For features of pictures, on the device and in the host's memory.

    Attributes:
        callers: See `scoring.LabelScorer`.
        exact: The same model without the rounding of its matrices to float8, where they are.
    """

    callers = 4

    def __init__(
        self,
        model: PackedModel,
        row_tokens: int | None = None,
        record: Record | None = None,
        prefix_bytes: int = 2**30,
        feature_bytes: tuple[int, int] = (2**30, 2**30),
    ) -> None:
        self.model, self.row_tokens, self._prefix_bytes = model, row_tokens, prefix_bytes
        self._shorter: list[int] = []
        self.features: PictureFeatures | None = None
        if model.family:
            from vlrank.engines.packed_pictures import PictureFeatures  # which takes seconds, and transformers

            self.features = PictureFeatures(model.family, model.visual, *feature_bytes)
        self.exact: PackedScorer | None = None
        self._kernel = kernel_for(*model.sizes[:3], model.device, model.dtype)
        self._passes = RowPasses(model, self._kernel, record)
        self._prefixes: OrderedDict[bytes, Int] = OrderedDict()  # their places in memory, the latest used last
        self._memory: PrefixMemory | None = None
        self._heads: dict[int, tuple[LabelTrie, npt.NDArray[np.float64], npt.NDArray[np.float64], list[int]]] = {}
        self._waiting: deque[_Job] = deque()
        self._running: deque[tuple[list[_Job], torch.Tensor, Any]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self.prompt_tokens = self.cached_tokens = self.requests = 0
        self._thread = threading.Thread(target=self._work, name="packed rows", daemon=True)
        self._thread.start()

    def score_labels(self, encoder: Encoder, requests: Sequence[Encoded]) -> list[Float32 | Exception]:
        """See `scoring.LabelScorer`. Prompts with the same `Encoded.prefix` share the work on it."""
        if self.features is not None:
            self.features.prepare(encoder, [path for request in requests for path in request.image_paths])
        call, jobs = _Call(), dict[int, _Job]()  # by the place of their request
        answers: dict[int, Float32 | Exception] = {}
        for at, request in enumerate(requests):
            try:
                if request.trie.nodes:
                    jobs[at] = self._job(call, encoder, request)
                else:  # one candidate: nothing to read
                    answers[at] = request.trie.log_probs(np.zeros(0, dtype=np.float32))
            except (OSError, ValueError) as error:  # a picture that has become unreadable
                answers[at] = error
        call.left = len(jobs)
        with self._wake:
            if self._closed:
                raise EngineDied("the engine is closed")
            self._waiting.extend(jobs.values())
            self.requests += len(requests)
            self.prompt_tokens += sum(len(request.ids) for request in requests)
            self._wake.notify()
        if jobs:
            call.landed.wait()
            answers |= self._answers(jobs)
        return [answers[at] for at in range(len(requests))]

    def shorten_rows(self, lengths: Sequence[int], like: int) -> list[int]:
        """Let rows be as short as what waits, before the first prompt comes; their passes are recorded here.

        Args:
            lengths: To choose from.
            like: Tokens of a row with whose results theirs must agree to the last bit: libraries choose the kernels of
                products by their sizes.

        Returns:
            The lengths that agree, which are used from now on.
        """
        drawn = np.random.default_rng(0)
        trie = LabelTrie(((1, 2), (1, 3, 2), (4, 2)))
        ids = [drawn.integers(0, len(self.model.embeddings), min(lengths) // 4) for _ in range(3)]
        prompts = [PromptTokens(part, np.tile(np.arange(len(part)), (3, 1)), trie) for part in ids]
        read = sum(prompt.reads for prompt in prompts)

        def results(length: int) -> torch.Tensor:
            return self._passes(PackedRow(prompts, length, row_reads(length)))[:read]

        expected = results(like)
        # The first pass of a length is launched step by step, the second one is a replay.
        self._shorter = [n for n in sorted(lengths) if all(torch.equal(results(n), expected) for _ in range(2))]
        return self._shorter

    def close(self) -> None:
        """Finish what is queued and give the memory back."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._prefixes.clear()
        self.features = self._memory = None
        del self.model, self._passes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- in the callers' threads ------------------------------------------------------------------------------------

    def _job(self, call: _Call, encoder: Encoder, request: Encoded) -> _Job:
        ids, positions = np.asarray(request.ids), encoder.positions(request)
        cut = request.prefix if 0 < request.prefix < len(ids) else 0
        visual = np.flatnonzero(ids == encoder.image_token_id) if request.image_paths else np.zeros(0, dtype=np.int64)
        if len(visual) and visual[0] < cut:
            cut = 0  # a prefix is text
        body = PromptTokens(ids[cut:], positions[:, cut:], request.trie, visual - cut, request.image_paths)
        if self.features is not None:
            self.features.check(request.image_paths)
        prefix = PromptTokens(ids[:cut], positions[:, :cut], None) if cut else None
        return _Job(call, encoder, body, prefix, ids[:cut].tobytes())

    def _answers(self, jobs: Mapping[int, _Job]) -> dict[int, Float32 | Exception]:
        """Scores of prompts that have landed; those that share a trie are computed together."""
        answers: dict[int, Float32 | Exception] = {}
        logits: dict[int, tuple[LabelTrie, dict[int, Float32]]] = {}
        for at, job in jobs.items():
            if isinstance(job.hidden, EngineDied):
                raise job.hidden
            if isinstance(job.hidden, Exception):
                answers[at] = job.hidden
                continue
            trie = job.body.trie
            assert trie is not None
            assert job.hidden is not None
            logits.setdefault(id(trie), (trie, {}))[1][at] = self._logits(trie, job.hidden)
        for trie, rows in logits.values():
            answers |= zip(rows, trie.log_probs(np.stack(list(rows.values()))), strict=True)
        return answers

    def _logits(self, trie: LabelTrie, hidden: Float32) -> Float32:
        """Logits of `LabelTrie.flat` from the hidden states at a prompt's reads.

        In float64, product by product: a matrix product's rounding may depend on its shape, and bfloat16 logits come in
        steps that turn close candidates into ties.
        """
        if id(trie) not in self._heads:
            tokens = torch.tensor([token for _, token in trie.flat], device=self.model.head.weight.device)
            weight = self.model.head.weight[tokens].double().cpu().numpy()
            bias = self.model.head.bias
            added = np.zeros(len(tokens)) if bias is None else bias[tokens].double().cpu().numpy()
            self._heads[id(trie)] = trie, weight, added, [trie.node_at[node] for node, _ in trie.flat]
        _, weight, added, places = self._heads[id(trie)]
        wide: npt.NDArray[np.float64] = (weight * hidden.astype(np.float64)[places]).sum(axis=1) + added
        return wide.astype(np.float32)

    # ---- in the thread that fills rows ------------------------------------------------------------------------------

    def _work(self) -> None:
        jobs: list[_Job] = []
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._waiting or self._running or self._closed)
                    if not self._waiting and not self._running:
                        return
                    jobs = self._take()
                if jobs:
                    self._launch(jobs)
                if self._running and (not jobs or len(self._running) > 1):
                    self._land()
        except Exception as error:  # nobody would ever be answered
            with self._wake:
                self._closed = True
                left = [*jobs, *self._waiting, *(job for running, *_ in self._running for job in running)]
            for job in left:
                if job.hidden is None:
                    died = EngineDied(f"the engine has failed: {error!r}")
                    died.__cause__ = error
                    self._settle([job], [died])

    def _take(self) -> list[_Job]:
        """Prompts for the next row; none while a row that they do not fill may become fuller."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        length = self.row_tokens
        if length is None or first.body.size >= length:
            return [self._waiting.popleft()]
        jobs: list[_Job] = []
        left: list[_Job] = []
        tokens, reads, places = 0, 0, row_reads(length)
        room, known = length, set[bytes]()  # of prefixes
        looked_at = [self._waiting.popleft() for _ in range(min(_LOOKED_AT, len(self._waiting)))]
        for job in looked_at:
            needs = 0 if job.prefix is None or job.key in known else job.prefix.size
            # One token and one read are left over for padding, see `RowShape`.
            fits = tokens + job.body.size < length and reads + job.body.reads < places
            alike = (job.prefix is None) == (first.prefix is None) and job.encoder is first.encoder
            if not jobs or (fits and alike and needs <= room):
                jobs.append(job)
                tokens, reads, room = tokens + job.body.size, reads + job.body.reads, room - needs
                known.add(job.key)
            else:
                left.append(job)
        if self._running and tokens < 0.9 * length and not left and not self._waiting:
            self._waiting.extend(jobs)
            return []
        self._waiting.extendleft(reversed(left))
        return sorted(jobs, key=lambda job: job.key)  # prompts of one prefix are neighbours

    def _length(self, tokens: int) -> int | None:
        """Of the shortest row with room for so many tokens and one more."""
        if self.row_tokens is None:
            return None
        for length in (*self._shorter, self.row_tokens):
            if tokens < length <= self.row_tokens:
                return length
        return -(-(tokens + 1) // _LONG_STEP) * _LONG_STEP

    def _launch(self, jobs: list[_Job]) -> None:
        try:
            hidden = self._hidden(jobs)
        except torch.OutOfMemoryError as error:
            self._shorten(jobs, error)
            return
        except (OSError, ValueError) as error:
            if len(jobs) > 1:  # find whose it is
                for job in jobs:
                    self._launch([job])
            else:
                self._settle(jobs, [error])
            return
        hidden, event = hidden[: sum(job.body.reads for job in jobs)], None  # the others are filling
        if hidden.is_cuda:
            landing = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            hidden = landing.copy_(hidden, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._running.append((jobs, hidden, event))

    def _land(self) -> None:
        jobs, hidden, event = self._running.popleft()
        try:
            if event is not None:
                event.synchronize()
        except torch.OutOfMemoryError as error:
            self._shorten(jobs, error)
            return
        stops = np.cumsum([job.body.reads for job in jobs])
        self._settle(jobs, np.split(hidden.float().numpy(), stops)[: len(jobs)])

    def _settle(self, jobs: Sequence[_Job], outcomes: Sequence[Float32 | Exception]) -> None:
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.hidden = outcome
            job.call.left -= 1
            if not job.call.left:
                job.call.landed.set()

    def _shorten(self, jobs: list[_Job], error: torch.OutOfMemoryError) -> None:
        """Put the prompts back, for rows of half the length; where rows are short already, the prompts fail."""
        self._forget_prefixes()
        torch.cuda.empty_cache()
        longest = max(max(job.body.size, len(job.prefix.ids) if job.prefix else 0) for job in jobs)
        if self.row_tokens is None or self.row_tokens // 2 < _SHORTEST_ROW or longest > self.row_tokens:
            self._settle(jobs, [error] * len(jobs))
            return
        self.row_tokens //= 2
        print(f"the GPU's memory is full: rows of {self.row_tokens} tokens from here on", flush=True)
        with self._wake:
            self._waiting.extendleft(reversed(jobs))

    def _hidden(self, jobs: list[_Job]) -> torch.Tensor:
        """Launch a row: [reads, hidden]."""
        length = self._length(sum(job.body.size for job in jobs))
        row = PackedRow([job.body for job in jobs], length, None if length is None else row_reads(length))
        features = None
        if paths := [path for job in jobs for path in job.body.pictures]:
            assert self.features is not None
            features = self.features(jobs[0].encoder, paths)
        if jobs[0].prefix is None:
            return self._passes(row, features)
        prefixes = {job.key: job.prefix for job in jobs if job.prefix is not None}
        memory = self._hold(prefixes)
        held = [self._prefixes[key] for key in prefixes]
        number = {key: at for at, key in enumerate(prefixes)}
        bounds = np.cumsum([0, *map(len, held)])
        context = Context(bounds, np.array([number[job.key] for job in jobs]))
        places = np.concatenate(held)
        return self._passes(row, features, Prefixes(memory, places, context))

    def _hold(self, wanted: dict[bytes, PromptTokens]) -> PrefixMemory:
        """Have the keys and values of prefixes; missing ones are computed."""
        needed = sum(prompt.size for prompt in wanted.values())
        memory = self._memory_for(needed)
        for key in wanted:
            if key in self._prefixes:
                self._prefixes.move_to_end(key)
                self.cached_tokens += len(wanted[key].ids)
        missing = [(key, prompt) for key, prompt in wanted.items() if key not in self._prefixes]
        if missing and self.row_tokens is not None:  # the next rows' prefixes fill this one's row of prefixes
            room = self.row_tokens - sum(prompt.size for _, prompt in missing)
            missing += self._soon(set(wanted), min(room, memory.tokens - needed))
        kept = set(wanted)
        while memory.free < sum(prompt.size for _, prompt in missing):
            oldest = next(key for key in self._prefixes if key not in kept)
            memory.give(self._prefixes.pop(oldest))
        for group in self._prefix_rows(missing):
            prompts = [prompt for _, prompt in group]
            places = memory.take(sum(prompt.size for prompt in prompts))
            row = PackedRow(prompts, self._length(len(places)))
            self._passes(row, prefixes=Prefixes(memory, places))
            for (key, _), own in zip(group, np.split(places, row.stops[:-1]), strict=True):
                self._prefixes[key] = own
        return memory

    def _memory_for(self, tokens: int) -> PrefixMemory:
        """Memory with room for so many tokens; less than was asked for where the GPU has no more."""
        if self._memory is None or self._memory.tokens < tokens:
            self._forget_prefixes()
            size = max(tokens, self._prefix_bytes // PrefixMemory.token_bytes(self.model))
            while self._memory is None:
                try:
                    self._memory = PrefixMemory(self.model, size)
                except torch.OutOfMemoryError:
                    if size == tokens:
                        raise
                    size = max(tokens, size // 2)
        return self._memory

    def _forget_prefixes(self) -> None:
        """Give their memory back, and that of recorded passes, which read it."""
        self._prefixes.clear()
        self._passes.recordings.clear()
        self._memory = None

    def _soon(self, known: set[bytes], room: int) -> list[tuple[bytes, PromptTokens]]:
        """Missing prefixes of waiting prompts, as many as fit ``room`` tokens."""
        found: list[tuple[bytes, PromptTokens]] = []
        with self._wake:
            waiting = list(islice(self._waiting, _LOOKED_AT))
        for job in waiting:
            if job.prefix is None or job.key in known or job.key in self._prefixes or job.prefix.size > room:
                continue
            known.add(job.key)
            found.append((job.key, job.prefix))
            room -= job.prefix.size
        return found

    def _prefix_rows(self, missing: list[tuple[bytes, PromptTokens]]) -> Iterator[list[tuple[bytes, PromptTokens]]]:
        group: list[tuple[bytes, PromptTokens]] = []
        tokens = 0
        for key, prompt in missing:
            if group and (self.row_tokens is None or tokens + prompt.size > self.row_tokens):
                yield group
                group, tokens = [], 0
            group.append((key, prompt))
            tokens += prompt.size
        if group:
            yield group
