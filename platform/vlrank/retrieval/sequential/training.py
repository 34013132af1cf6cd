"""Training of SASRec and BSARec, and the ranking of the whole catalogue by them.

Every prefix of a history is a sample whose next item is learned, with the cross-entropy over the whole catalogue
(Klenitskiy and Vasilev 2023, arXiv 2309.07602). SASRec can learn from all places of a history at once instead; BSARec
cannot, as its filter reads in both directions. Both stop by the NDCG@10 of validation users, all items ranked but those
of the history. Large catalogues take a sampled softmax with the logQ correction (Bengio and Senécal 2008).

After each epoch ``state.safetensors`` is replaced, whole: weights, Adam's moments, best weights, evaluations.
Every epoch draws from a seed of its own, so on a CPU a run that was killed ends with the weights of an unbroken one.

A step is hundreds of small kernels, which a CPU launches several times more slowly than a GPU computes them: on GPUs
steps are recorded and replayed.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from vlrank.cuda_graphs import Record, Recordings
from vlrank.data.lists import Ints, Lists
from vlrank.data.tables import atomic_write_bytes
from vlrank.errors import UserError
from vlrank.retrieval.sequential.data import SequenceData, Task, batches, samples
from vlrank.retrieval.sequential.models import SequenceModel
from vlrank.storage import Location

_SCORES = 16_000_000  # scores held at once when the catalogue is ranked
_LOGITS = 1 << 26  # scores held at once in training
_KEPT = 1024  # recorded steps; there is one for each length of histories, and for each rest of a pool of batches
_K = 10
History = list[dict[str, Any]]
"""``epoch``, ``loss``, ``ndcg`` (validation NDCG@10) and ``seconds`` of each epoch."""


def best_epoch(history: History) -> int:
    """0-based; of equal ones the first."""
    return int(np.argmax([line["ndcg"] for line in history]))


def windows(items: Tensor, starts: Tensor, ends: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The inputs of samples, right-aligned, and where they come from.

    Args:
        items: int64 [N], all sequences back to back.
        starts, ends: int64 [B].
        length: Of the longest sample; given, so that no GPU has to be waited for.

    Returns:
        int64 [B, length] item ids, 0 before a sample's first item, and their int64 [B, length] places in ``items``.
    """
    places = ends[:, None] - length + torch.arange(length, device=items.device)
    return items[places.clamp(min=0)] * (places >= starts[:, None]), places


def softmax_loss(model: SequenceModel, states: Tensor, targets: Tensor, drawn: Tensor | None, q: Tensor) -> Tensor:
    """Mean cross-entropy of the targets.

    With ``drawn`` the normaliser is an estimate: a drawn item counts as ``exp(score) / (n q)``, which makes the sum of
    the draws unbiased for that of the catalogue. The target counts as itself, once, and not again where it is drawn
    (Khrylchenko et al. 2025, arXiv 2507.09331).

    Args:
        model: Gives the item embeddings.
        states: float [N, H].
        targets: int64 [N].
        drawn: int64 [n], items drawn with replacement from ``q``; None for the whole catalogue.
        q: float [n_items + 1].
    """
    if drawn is None:
        logits = model.scores(states)[:, 1:]  # there is no item 0
        return torch.nn.functional.cross_entropy(logits, targets - 1)
    own = (states * model.items(targets)).sum(-1)
    others = states @ model.items(drawn).T - torch.log(len(drawn) * q[drawn])
    others = others.masked_fill(drawn == targets[:, None], -torch.inf)
    return (torch.cat([own[:, None], others], 1).logsumexp(1) - own).mean()


def _backward(model: SequenceModel, states: Tensor, targets: Tensor, drawn: Tensor | None, q: Tensor) -> Tensor:
    """Gradients of `softmax_loss` for all weights; returns the loss.

    The scores of a few thousand positions for the whole catalogue would fill the memory: they are made in parts.
    """
    leaf = states.detach().requires_grad_()
    step = max(1, _LOGITS // (len(q) if drawn is None else len(drawn)))
    total = torch.zeros((), device=states.device)
    for part, wanted in zip(leaf.split(step), targets.split(step), strict=True):
        loss = softmax_loss(model, part, wanted, drawn, q) * (len(part) / len(leaf))
        loss.backward()
        total += loss.detach()
    states.backward(leaf.grad)
    return total


class Training:
    """One training run in one process; goes on where the state in ``folder`` ends, if it is of the same task.

    Args:
        task: What to train.
        data: The dataset.
        folder: Where the state is kept.
        device: CPU or GPU.
        record: Makes one launch of a step, see `cuda_graphs`. Learning from whole histories cannot be recorded: which
            places it reads depends on them.
    """

    def __init__(
        self, task: Task, data: SequenceData, folder: Location, device: torch.device, record: Record | None = None
    ) -> None:
        self.task, self.device = task, device
        torch.manual_seed(task.seed)
        self.model = SequenceModel(data.n_items, task.settings, filtered=task.method == "bsarec").to(device)
        self.ranker = Ranker(self.model, data.popularity, device)
        self.history: History = []
        self._state = folder / "state.safetensors"
        self._best = _copy(self.model.state_dict())
        self._items = torch.from_numpy(data.train.items.astype(np.int64)).to(device)
        starts, ends = samples(data.train, task.settings)
        self._lengths = ends - starts
        self._starts, self._ends = torch.from_numpy(starts).to(device), torch.from_numpy(ends).to(device)
        self._recordings: Recordings[tuple[Tensor, Tensor]] = Recordings(f"training {task.method}", record, _KEPT)
        capturable = record is not None and device.type == "cuda"
        if capturable:  # a shape's first step is launched all the same
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=task.settings.lr or 1e-3, capturable=capturable)
        draws = torch.from_numpy(np.where(data.popularity > 0, data.popularity**0.75, 0))
        self._q = (draws / draws.sum()).float().to(device)
        order = np.random.default_rng(task.seed).permutation(len(data.targets["val"]))
        users = np.sort(order[: task.settings.val_users])
        self._val, self._targets = data.histories["val"].take(users), data.targets["val"][users]
        self._resume()

    def run(self, after_epoch: Callable[[History], None]) -> None:
        """Train to the end; the model has the best weights then.

        Args:
            after_epoch: Called once the state of an epoch is written.

        Raises:
            UserError: the loss is no number any more.
        """
        while not self._is_done():
            begun = time.perf_counter()
            loss = self._train_epoch()
            ndcg = self.ranker.ndcg(self._val, self._targets)
            seconds = round(time.perf_counter() - begun, 3)
            self.history.append({"epoch": len(self.history) + 1, "loss": loss, "ndcg": ndcg, "seconds": seconds})
            if best_epoch(self.history) == len(self.history) - 1:
                self._best = _copy(self.model.state_dict())
            self._save()
            after_epoch(self.history)
        self.model.load_state_dict(self._best)

    def _is_done(self) -> bool:
        done, settings = len(self.history), self.task.settings
        return done >= settings.epochs or (done > 0 and done - 1 - best_epoch(self.history) >= settings.patience)

    def _train_epoch(self) -> float:
        """Train for one epoch; returns the mean loss of its steps."""
        settings, epoch = self.task.settings, len(self.history) + 1
        rng = np.random.default_rng([self.task.seed, epoch])
        torch.manual_seed(int(rng.integers(2**31)))
        self.model.train()
        total = torch.zeros((), device=self.device)
        order = batches(self._lengths, settings.batch_size, rng)
        rows = torch.from_numpy(np.concatenate(order)).to(self.device)
        for batch, own in zip(order, rows.split([len(batch) for batch in order]), strict=True):
            total += self._step(self._starts[own], self._ends[own], int(self._lengths[batch].max()))
        mean = float(total) / len(order)
        if not np.isfinite(mean):
            raise UserError(f"{self.task.method}: the loss of epoch {epoch} is {mean}", "Lower sequential.lr.")
        return mean

    def _step(self, starts: Tensor, ends: Tensor, length: int) -> Tensor:
        """Learn from samples, the longest of which has ``length`` items; the loss, until the next step."""

        def prepare() -> tuple[tuple[Tensor, Tensor], Callable[[], Tensor]]:
            held = starts.clone(), ends.clone()
            return held, lambda: self._learn(*held, length)

        recording = self._recordings.get((len(starts), length), prepare)
        if recording is None:
            return self._learn(starts, ends, length)
        for place, values in zip(recording.held, (starts, ends), strict=True):
            place.copy_(values)
        recording.replay()
        return recording.result

    def _learn(self, starts: Tensor, ends: Tensor, length: int) -> Tensor:
        settings = self.task.settings
        inputs, places = windows(self._items, starts, ends, length)
        states = self.model(inputs)
        if settings.samples == "histories":
            learned = inputs > 0
            states, targets = states[learned], self._items[places[learned] + 1]
        else:
            states, targets = states[:, -1], self._items[ends]
        drawn = torch.multinomial(self._q, settings.negatives, replacement=True) if settings.negatives else None
        self._optimizer.zero_grad(set_to_none=True)
        loss = _backward(self.model, states, targets, drawn, self._q)
        self._optimizer.step()
        return loss

    def _save(self) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        for number, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
        write_tensors(self._state, tensors, self.task, self.history)

    def _resume(self) -> None:
        tensors, self.history = read_tensors(self._state, self.task)
        if not self.history:
            return
        self.model.load_state_dict(_part(tensors, "model."))
        self._best = {name: value.to(self.device) for name, value in _part(tensors, "best.").items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "adam.").items():
            number, _, key = name.partition(".")
            moments.setdefault(int(number), {})[key] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})


class Ranker:
    """Ranks the whole catalogue by a model, without the history and without cold items.

    Args:
        model: Gives the scores.
        popularity: int64 [n_items + 1]: training interactions. Items without any are cold: nothing was learned of them.
        device: Of the model.
    """

    def __init__(self, model: SequenceModel, popularity: Ints, device: torch.device) -> None:
        self.model, self.device = model, device
        self._cold = torch.from_numpy(popularity == 0).to(device)
        order = np.lexsort((np.arange(len(popularity)), -popularity))
        # Warm items, popular ones first: columns in this order, sorted stably, let popularity break ties.
        self._order = torch.from_numpy(order[: int((popularity > 0).sum())]).to(device)

    @torch.no_grad()
    def scores(self, histories: Lists) -> Tensor:
        """float32 [U, n_items + 1]; -inf for what cannot be listed."""
        self.model.eval()
        items = torch.from_numpy(histories.items.astype(np.int64)).to(self.device)
        offsets = torch.from_numpy(histories.offsets).to(self.device)
        starts = torch.maximum(offsets[:-1], offsets[1:] - self.model.max_length)
        longest = min(int(histories.lengths.max()), self.model.max_length)
        inputs, _ = windows(items, starts, offsets[1:], longest)
        scores = self.model.scores(self.model(inputs)[:, -1])
        scores[torch.from_numpy(histories.segments()).to(self.device), items] = -torch.inf
        return scores.masked_fill_(self._cold, -torch.inf)

    def ndcg(self, histories: Lists, targets: Ints) -> float:
        """Mean NDCG@10 of one target (int64 [U]) per user; a target that cannot be listed is a miss."""
        gains = []
        for rows in self._blocks(histories):
            scores = self.scores(histories.take(rows))
            own = scores.gather(1, torch.from_numpy(targets[rows]).to(self.device)[:, None])
            ranks = 1 + (scores > own).sum(1)
            hit = torch.isfinite(own[:, 0]) & (ranks <= _K)
            gains.append((hit / torch.log2(1.0 + ranks)).double().cpu())
        return float(torch.cat(gains).mean())

    def top(self, histories: Lists, top_k: int) -> Lists:
        """The best ``top_k`` items of each user with float32 scores; equal scores by popularity, then by item id."""
        k = min(top_k, len(self._order))
        found: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        for rows in self._blocks(histories):
            scores = self.scores(histories.take(rows))[:, self._order]
            columns = scores.topk(k).indices.sort(dim=1).values
            values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
            found.append((self._order[columns.gather(1, order)].cpu().numpy(), values.cpu().numpy()))
        if not found:
            return Lists(histories.users, histories.offsets, histories.items, np.zeros(0, np.float32))
        items, scores_of = (np.concatenate(parts).ravel() for parts in zip(*found, strict=True))
        lists = Lists(histories.users, np.arange(len(histories.users) + 1) * k, items, scores_of)
        return lists.keep(np.isfinite(scores_of))

    def _blocks(self, histories: Lists) -> list[Ints]:
        rows, step = np.arange(len(histories.users)), max(1, _SCORES // len(self._cold))
        return [rows[start : start + step] for start in range(0, len(rows), step)]


def write_tensors(path: Location, tensors: Mapping[str, Tensor], task: Task, history: History) -> None:
    """Write a safetensors file that also says whose it is, whole or not at all."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    atomic_write_bytes(path, save(plain, {"fingerprint": task.fingerprint, "history": json.dumps(history)}))


def read_tensors(path: Location, task: Task) -> tuple[dict[str, Tensor], History]:
    """What `write_tensors` wrote for this task; nothing where the file is missing, torn or another task's."""
    if not path.is_file():
        return {}, []
    data = path.read_bytes()
    try:
        facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        return (load(data), json.loads(facts["history"])) if facts["fingerprint"] == task.fingerprint else ({}, [])
    except Exception as error:
        if isinstance(error, ValueError | KeyError) or type(error).__name__ == "SafetensorError":
            return {}, []
        raise


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
