"""Attention within packed rows (`vlrank.engines.packed_rows`).

On GPUs a row takes two or three calls of a flash attention kernel for documents of varying length: segments to
themselves, chains to their bodies, and everything to its prefix, joined by the log-sum-exp of their scores. Elsewhere,
and in float32, each prompt takes one or two calls of PyTorch's attention with a mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from vlrank.engines import varlen
from vlrank.engines.packed_rows import Documents, Int, PackedRow, PromptTokens, RowShape, bounds_of, longest
from vlrank.prompting.labels import LabelTrie

_log = logging.getLogger(__name__)

Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`varlen.flash2_lse` or `varlen.flash4_lse`."""


@dataclass(frozen=True, slots=True)
class Context:
    """Where the prefixes that a row's prompts continue lie among the prefixes' keys and values.

    Attributes:
        bounds: Where each prefix begins, and the end of the last one.
        of: The prefix of each prompt, by number; rising, so that prompts of one prefix are neighbours.
    """

    bounds: Int
    of: Int


class RowTensors:
    """The numbers of a row on a device, which travel in one piece.

    Args:
        arrays: By name.
        device: Where they go.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> None:
        self._bytes = sent(_in_one_piece(arrays), device)
        self._views: dict[str, torch.Tensor] = {}
        start = 0
        for name, array in arrays.items():
            kind = torch.int64 if array.dtype == np.int64 else torch.int32
            self._views[name] = self._bytes[start : start + array.nbytes].view(kind).view(array.shape)
            start += _aligned(array.nbytes)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._views[name]

    def renew(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Put the numbers of another row of the same shape in the same places."""
        self._bytes.copy_(pinned(_in_one_piece(arrays), self._bytes.device), non_blocking=True)


def _in_one_piece(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    whole = np.zeros(sum(_aligned(array.nbytes) for array in arrays.values()), dtype=np.uint8)
    start = 0
    for array in arrays.values():
        whole[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += _aligned(array.nbytes)
    return whole


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


class RowAttention:
    """Attention for one row on one device.

    Args:
        row: The row.
        device: Where the tensors are.
        scaling: Factor of the scores.
        kernel: None computes with masks.
        context: Of the row's prompts; None where they have no prefix.
        shape: Of the row, to which it is padded; needs a kernel.
        more: Further numbers of the row.

    Attributes:
        tensors: `arrays_of` the row, on the device.
    """

    def __init__(
        self,
        row: PackedRow,
        device: torch.device,
        scaling: float,
        kernel: Kernel | None,
        context: Context | None = None,
        shape: RowShape | None = None,
        more: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self.row, self.device, self.scaling, self.kernel, self.context = row, device, scaling, kernel, context
        if shape is None:
            documents = {**row.documents, **documents_behind(row, context)}
            self._longest = {name: _rounded(*both) for name, both in documents.items()}
        else:
            self._longest = _longest_of(shape)
        self.tensors = RowTensors(arrays_of(row, context, shape, more), device)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Every token of the row: q [T, heads, head dim], k and v [T, key-value heads, head dim] -> like q.

        Args:
            q, k, v: Of the row.
            prefix: Keys and values of the context, [tokens, key-value heads, head dim].
        """
        if self.kernel is None:
            return self._masked(q, k, v, prefix, ends=False)
        out, lse = self._flash("self", q, k, v, causal=True)
        if len(tails := self.tensors["tails"]):
            far = self._flash("tails", q[tails], k, v)
            joined, joined_lse = join((out[tails], lse[:, tails]), far)
            out[tails], lse[:, tails] = joined, joined_lse
        if prefix is not None:
            out = _joined(self.device.type)((out, lse), self._flash("context", q, *prefix))
        return out

    def at_reads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The same at the row's reads only: [reads, heads, head dim]."""
        if self.kernel is None:
            return self._masked(q, k, v, prefix, ends=True)
        reads, tails, at = (self.tensors[name] for name in ("reads", "tails", "tails_in_reads"))
        out, lse = self._flash("reads", q[reads], k, v)
        if len(tails):
            near = self._flash("chains", q[tails], k[tails], v[tails], causal=True)
            joined, joined_lse = join(near, (out[at], lse[:, at]))
            out[at], lse[:, at] = joined, joined_lse
        if prefix is not None:
            out, _ = join((out, lse), self._flash("context of reads", q[reads], *prefix))
        return out

    def _flash(
        self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.kernel is not None
        bounds = self.tensors[f"{name} queries"], self.tensors[f"{name} keys"]
        return self.kernel(q, k, v, *bounds, *self._longest[name], self.scaling, causal)

    def _masked(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prefix: tuple[torch.Tensor, torch.Tensor] | None,
        ends: bool,
    ) -> torch.Tensor:
        parts = []
        for i, (prompt, span) in enumerate(zip(self.row.prompts, self.row.spans, strict=True)):
            keys, values, before = k[span.start : span.stop], v[span.start : span.stop], 0
            if prefix is not None and self.context is not None:
                begin, end = self.context.bounds[self.context.of[i] :][:2]
                keys, values = (torch.cat([p[begin:end], own]) for p, own in zip(prefix, (keys, values), strict=True))
                before = end - begin
            elif not ends:  # no mask to build, and half of the work
                body = slice(span.start, span.end)
                parts.append(self._attend(q[body], k[body], v[body], None))
            masked = range(span.end - 1 if ends else span.start if before else span.end, span.stop)
            if len(masked) and (not ends or prompt.reads):
                mask = torch.from_numpy(span.visible(masked, before)).to(self.device)
                parts.append(self._attend(q[masked.start : masked.stop], keys, values, mask))
        out = torch.cat(parts) if parts else q[:0]
        return torch.nn.functional.pad(
            out, (0, 0, 0, 0, 0, (len(self.row.reads) if ends else self.row.size) - len(out))
        )

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)


def arrays_of(
    row: PackedRow,
    context: Context | None = None,
    shape: RowShape | None = None,
    more: Mapping[str, npt.NDArray[Any]] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """`PackedRow.arrays`, bounds of the prefixes that a row continues, and further numbers; see `RowAttention`."""
    return {**row.arrays(shape), **bounds_of(documents_behind(row, context), shape), **(more or {})}


def documents_behind(row: PackedRow, context: Context | None) -> Documents:
    """Bounds for the calls to prefixes: ``context``, all tokens to the prefix of their prompt; ``context of reads``."""
    if context is None:
        return {}
    ends = np.cumsum([prompt.reads for prompt in row.prompts])
    return {
        "context": (_behind_context(context.of, row.stops, row.size), context.bounds),
        "context of reads": (_behind_context(context.of, ends, len(row.reads)), context.bounds),
    }


def _behind_context(of: Int, ends: Int, size: int) -> Int:
    """Bounds of the queries of each prefix. The filling joins the last one: kernels want keys for every query."""
    return np.concatenate([[0], ends[:-1][np.diff(of) != 0], [size]])


def _rounded(queries: Int, keys: Int) -> tuple[int, int]:
    """Bounds of the lengths of queries and of keys."""
    q, k = (max(longest(bounds), 1) for bounds in (queries, keys))
    return -(-q // 128) * 128, -(-k // 128) * 128


def _longest_of(shape: RowShape) -> dict[str, tuple[int, int]]:
    """Bounds of the lengths of queries and of keys in the documents of all rows of a shape."""
    padded = max(shape.longest_read, shape.tails)  # one document holds the padded tails
    return {
        "self": (shape.longest, shape.longest),
        "tails": (padded, shape.longest),
        "reads": (shape.longest_read, shape.longest),
        "chains": (shape.longest_read, shape.longest_read),
        "context": (shape.longest_behind, shape.longest_prefix),
        "context of reads": (shape.reads, shape.longest_prefix),
    }


def join(
    near: tuple[torch.Tensor, torch.Tensor], far: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys, from that over each: outputs [T, heads, d] and log-sum-exps [heads, T]."""
    (a, lse_a), (b, lse_b) = near, far
    weight = torch.sigmoid(lse_a.float() - lse_b.float()).transpose(0, 1).unsqueeze(-1)
    return (a.float() * weight + b.float() * (1 - weight)).to(a.dtype), torch.logaddexp(lse_a, lse_b)


@cache
def _joined(device: str) -> Callable[..., torch.Tensor]:
    """`join` without its log-sum-exp; on a GPU one pass over memory instead of ten, where Triton can be used."""
    if device == "cuda":
        try:
            from vlrank.engines.packed_kernels import join as fused
        except ImportError:
            pass
        else:
            return fused
    return lambda near, far: join(near, far)[0]


def sent(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array on a device, without waiting for what the device computes."""
    return pinned(array, device).to(device, non_blocking=True)


def pinned(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array in memory that a device reads by itself."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


@cache
def kernel_for(heads: int, key_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The fastest kernel that is installed and gives what attention with masks gives; None computes with masks."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    generator = torch.Generator(device).manual_seed(0)

    def drawn(tokens: int, n: int) -> torch.Tensor:
        return torch.randn(tokens, n, head_dim, device=device, dtype=dtype, generator=generator)

    trie = LabelTrie(((1, 9), (1, 1, 9), (1, 2, 9), (1, 2, 3, 9), (1, 2, 4, 9), (2, 9), (2, 2, 9)))
    lengths = (1, 129, 570, 321, 2)
    prompts = [PromptTokens(np.zeros(n, dtype=np.int64), np.tile(np.arange(n), (3, 1)), trie) for n in lengths]
    row = PackedRow(prompts, length=2048, max_reads=64)
    context = Context(np.array([0, 70, 90, 490]), np.array([0, 0, 1, 2, 2]))
    q, k, v = drawn(row.size, heads), drawn(row.size, key_heads), drawn(row.size, key_heads)
    prefix = drawn(490, key_heads), drawn(490, key_heads)
    used, reads = slice(row.filled), slice(sum(p.reads for p in prompts))
    shapes = RowShape.of(row), RowShape.of(row, documents_behind(row, context)["context"])
    ways = ((None, None, None), (context, prefix, None), (None, None, shapes[0]), (context, prefix, shapes[1]))

    def results(kernel: Kernel | None) -> list[torch.Tensor]:
        found = []
        for given, held, shape in ways:
            attention = RowAttention(row, device, head_dim**-0.5, kernel, given, shape if kernel else None)
            found += [attention(q, k, v, held)[used].float(), attention.at_reads(q, k, v, held)[reads].float()]
        return found

    expected = results(None)
    for kernel in (varlen.flash4_lse, varlen.flash2_lse):
        try:
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(results(kernel), expected, strict=True)]
        except ImportError:
            continue
        except Exception as error:  # whatever a compiler of kernels may raise
            _log.warning("%s is not used: %s", kernel.__name__, error)
            continue
        if max(errors) < 0.01:  # bfloat16 keeps 8 bits: 2^-8 is 0.4%
            return kernel
        _log.warning(
            "%s is not used: it differs from PyTorch's attention by %.1f%%", kernel.__name__, 100 * max(errors)
        )
    return None
