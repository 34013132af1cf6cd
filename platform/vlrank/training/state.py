"""What a run resumes from: one state per run, in two places that are overwritten in turn.

``RUN/resume/a`` and ``b`` hold a file ``rank-R.json`` per worker, and ``rank-R.N.safetensors`` with its tensors. The
JSON file is removed before a place is overwritten and is written last, so that a kill at any moment leaves a whole
state in the other place. Nothing is pickled. Sharded tensors are kept as the shares of their ranks, and another number
of ranks can read them: ``torch.distributed.checkpoint`` does the same, but lists its files in a pickle.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlrank.data.tables import atomic_path, atomic_write_text
from vlrank.errors import UserError
from vlrank.storage import Location, listing, remove_tree
from vlrank.training.checkpoints import whole_file

if TYPE_CHECKING:
    import torch

FOLDER = "resume"
PLACES = ("a", "b")
_PART_BYTES = 2**31  # of a file: what is copied to the host at once where there is no room for a copy of everything


@dataclass(frozen=True, slots=True)
class SavedState:
    """A whole state.

    Attributes:
        place: Its folder.
        step: Optimizer steps that were done.
        world: Ranks that wrote it.
        finished: Whether training was over; then it holds no tensors.
        trainer: The ``TrainerState`` of transformers as a dict.
    """

    place: Location
    step: int
    world: int
    finished: bool
    trainer: Mapping[str, Any]


def saved_states(out: Location, committed: int) -> list[SavedState]:
    """The whole states of a run, newest first.

    Args:
        out: The run folder.
        committed: Step of the newest evaluation that the run has recorded; later states are left out.
    """
    found = [state for name in PLACES if (state := _whole_state(out / FOLDER / name)) and state.step <= committed]
    return sorted(found, key=lambda state: -state.step)


def _whole_state(place: Location) -> SavedState | None:
    first = _facts(place, 0)
    if first is None:
        return None
    for rank in range(first["world"]):
        facts = _facts(place, rank)
        if facts is None or facts["write"] != first["write"]:
            return None
        files = [place / name for name in facts["files"]]
        try:
            if not all(whole_file(file) for file in files):
                return None
        except FileNotFoundError:
            return None
    return SavedState(place, first["step"], first["world"], first["finished"], first["trainer"])


def _facts(place: Location, rank: int) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        facts: dict[str, Any] = json.loads((place / f"rank-{rank}.json").read_text(encoding="utf-8"))
        return facts
    return None


def place_to_write(out: Location, committed: int) -> Location:
    """The place that does not hold the newest state of the run."""
    newest = next(iter(saved_states(out, committed)), None)
    return out / FOLDER / (PLACES[1] if newest is not None and newest.place.name == PLACES[0] else PLACES[0])


def drop_tensors(out: Location) -> None:
    """Delete the states of a run that is over, but for the note that it is."""
    for name in PLACES:
        facts = _facts(out / FOLDER / name, 0)
        if facts is None or not facts["finished"]:
            remove_tree(out / FOLDER / name)


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    """What a rank writes into a place.

    Attributes:
        place: From `place_to_write`.
        facts: ``step``, ``world``, ``write`` (which names the write and is the same on all ranks), ``finished``,
            ``trainer`` on rank 0, and ``tree``, a dict of values made by `flatten`.
        tensors: By name; on any device.
    """

    place: Location
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def write_draft(draft: Draft, rank: int) -> None:
    """Write a rank's share of a state.

    Raises:
        UserError: no space left, or no permission.
    """
    from safetensors.torch import save_file

    place = draft.place
    (place / f"rank-{rank}.json").unlink(missing_ok=True)
    for pattern in (f"rank-{rank}.*.safetensors", f".rank-{rank}.*.tmp"):
        for old in listing(place, pattern):
            old.unlink(missing_ok=True)
    files = []
    for i, names in enumerate(_parts(draft.tensors)):
        files.append(f"rank-{rank}.{i}.safetensors")
        with atomic_path(place / files[-1]) as file:
            save_file({name: draft.tensors[name].detach().cpu().contiguous() for name in names}, file)
    atomic_write_text(place / f"rank-{rank}.json", json.dumps({**draft.facts, "files": files}))


def _parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += tensor.nbytes
    if part:
        yield part


# ---- nested values ---------------------------------------------------------------------------------------------------


def flatten(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A nested value as JSON, its tensors apart.

    Args:
        value: Dicts, lists, tuples, tensors and what JSON knows; of a sharded tensor this rank's share is taken.

    Returns:
        ``{"dict": [[key, value], ...]}``, ``{"tuple": [...]}``, ``{"tensor": NAME, "sharded": bool}``, lists and
        plain values, which `restore` reads; and the tensors by name, their path in ``value``. One that occurs again
        is kept once.

    Raises:
        TypeError: a value of any other type.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def flat(entry: Any, name: str) -> Any:
        if isinstance(entry, torch.Tensor):
            sharded = hasattr(entry, "to_local")
            if id(entry) not in names:
                names[id(entry)] = name
                tensors[name] = _own_share(entry) if sharded else entry
            return {"tensor": names[id(entry)], "sharded": sharded}
        if isinstance(entry, Mapping):
            return {"dict": [[key, flat(inner, f"{name}/{key}")] for key, inner in entry.items()]}
        if isinstance(entry, list | tuple):
            entries = [flat(inner, f"{name}/{i}") for i, inner in enumerate(entry)]
            return {"tuple": entries} if isinstance(entry, tuple) else entries
        if entry is None or isinstance(entry, bool | int | float | str):
            return entry
        raise TypeError(f"{name} is a {type(entry).__name__}, which a state cannot hold")

    return flat(value, ""), tensors


def _own_share(tensor: Any) -> torch.Tensor:
    from torch.distributed.tensor import Shard

    if tensor.device_mesh.ndim != 1 or tensor.placements != (Shard(0),):
        raise NotImplementedError(f"a tensor that is sharded as {tensor.placements}")
    share: torch.Tensor = tensor.to_local()
    return share


def restore(saved: Any, tensor: Callable[[str, bool], torch.Tensor]) -> Any:
    """The nested value of `flatten`.

    Args:
        saved: What `flatten` returned.
        tensor: Function of a tensor's name and whether it was sharded, to the tensor.
    """
    if isinstance(saved, list):
        return [restore(entry, tensor) for entry in saved]
    if not isinstance(saved, dict):
        return saved
    if "dict" in saved:
        return {key: restore(entry, tensor) for key, entry in saved["dict"]}
    if "tuple" in saved:
        return tuple(restore(entry, tensor) for entry in saved["tuple"])
    return tensor(saved["tensor"], saved["sharded"])


# ---- reading ---------------------------------------------------------------------------------------------------------


class StateReader:
    """Reads a state on one of the ranks of a resumed run; tensors come on the CPU.

    Args:
        state: From `saved_states`.
        rank, world: Of this process; ``world`` may differ from the state's.
    """

    def __init__(self, state: SavedState, rank: int, world: int) -> None:
        self.state, self._rank, self._world = state, rank, world
        self._trees: dict[int, dict[str, Any]] = {}
        self._files: dict[int, dict[str, Path]] = {}
        self._copies = tempfile.TemporaryDirectory(prefix="vlrank-state-")  # of files in a bucket

    def part(self, name: str) -> Any:
        """A value of the tree, e.g. ``optimizer``; None where there is none.

        Sharded tensors are this rank's share.
        """
        return restore(self._tree(0).get(name), self._tensor)

    def own(self, name: str) -> Any:
        """A value of this rank's own tree, e.g. ``rng``; None where a rank of this number wrote nothing."""
        if self._rank >= self.state.world:
            return None
        return restore(self._tree(self._rank).get(name), lambda key, _: self._read(self._rank, key))

    def _tensor(self, name: str, sharded: bool) -> torch.Tensor:
        import torch

        if not sharded:
            return self._read(0, name)
        if self._world == self.state.world:
            return self._read(self._rank, name)
        whole = torch.cat([self._read(rank, name) for rank in range(self.state.world)])
        shares = whole.chunk(self._world)
        return shares[self._rank] if self._rank < len(shares) else whole[:0]

    def _tree(self, rank: int) -> dict[str, Any]:
        if rank not in self._trees:
            facts = _facts(self.state.place, rank)
            if facts is None:
                raise UserError(f"{self.state.place} has changed while it was read", "Run the same command again.")
            self._trees[rank] = dict(facts["tree"])
            self._files[rank] = {}
            for name in facts["files"]:
                self._index(rank, self._local(self.state.place / name))
        return self._trees[rank]

    def _local(self, file: Location) -> Path:
        if isinstance(file, Path):
            return file
        copy = Path(self._copies.name) / file.name
        file.download(copy)
        return copy

    def close(self) -> None:
        """Delete local copies."""
        self._copies.cleanup()

    def _index(self, rank: int, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as content:
            self._files[rank] |= dict.fromkeys(content.keys(), file)

    def _read(self, rank: int, name: str) -> torch.Tensor:
        from safetensors import safe_open

        self._tree(rank)
        with safe_open(self._files[rank][name], framework="pt") as content:
            tensor: torch.Tensor = content.get_tensor(name)
        return tensor
