"""Label trie: exact log-probabilities of the answers "1".."N", for any tokenizer.

Numbers are often several tokens ("12" = "1", "2"), so the logit of one token cannot rank candidates. The labels form a
trie; at each node the model's logits are normalised over the continuations that are valid for N candidates, and a
label's log-probability is the sum along its path, the end token included. Nodes with one valid continuation cost
nothing. With Qwen's single digits and 20 candidates three nodes are read: the root, after "1" and after "2".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vlrank.errors import UserError
from vlrank.prompting.chat_template import chat_template, render_messages

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Node:
    """A place in the trie where the model has a choice.

    Attributes:
        path: Label tokens read before this node; empty at the root.
        choices: Token ids that continue towards at least one label, ascending; at least two.
    """

    path: tuple[int, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True)
class LabelTrie:
    """The labels "1".."N" as token sequences, and how their probabilities are read.

    Attributes:
        labels: Token ids of each label, the end token last; prefix-free.
        drop: How many of the rendered prompt's last tokens belong to the labels, because the tokenizer joins the end of
            the prompt with the number (a trailing space, usually); 0 for Qwen.
        nodes: Nodes with more than one continuation, shortest path first.
    """

    labels: tuple[tuple[int, ...], ...]
    drop: int = 0
    nodes: tuple[Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        continuations: dict[tuple[int, ...], set[int]] = {}
        for label in self.labels:
            for depth, token in enumerate(label):
                continuations.setdefault(label[:depth], set()).add(token)
        if len(set(self.labels)) != len(self.labels) or any(label in continuations for label in self.labels):
            raise ValueError("labels must differ and none may be the beginning of another; is the end token missing?")
        nodes = (Node(path, tuple(sorted(tokens))) for path, tokens in continuations.items() if len(tokens) > 1)
        object.__setattr__(self, "nodes", tuple(sorted(nodes, key=lambda node: (len(node.path), node.path))))

    @classmethod
    def of(cls, tokenizer: Any, n: int) -> LabelTrie:
        """Ask the tokenizer (or processor) how it writes "1".."n" where an answer begins.

        A label's tokens are what follows the prompt's tokens in the tokenised whole text, so numbers of several digits
        in one token, leading-space variants and joined boundaries come out as the model saw them in training.

        Raises:
            UserError: the tokenizer cannot tell the numbers apart.
        """
        if n < 1:
            raise ValueError(f"a prompt needs at least one candidate, got {n}")
        answers = [str(number) for number in range(1, n + 1)]
        return cls.of_answers(tokenizer, answers, f"Answer with only one number (1-{n}).")

    @classmethod
    def of_answers(cls, tokenizer: Any, answers: Sequence[str], question: str) -> LabelTrie:
        """The trie of any answers that differ, such as "Yes" and "No"; ``question`` ends the prompts they answer.

        Raises:
            UserError: the tokenizer cannot tell the answers apart.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        prompt = render_messages(tokenizer, [{"role": "user", "content": question}])
        alone = _ids(tokenizer, prompt)
        whole = [_ids(tokenizer, prompt + answer) for answer in answers]
        common = min(_common(alone, ids) for ids in whole)
        if common == 0:
            raise UserError("the tokenizer rewrites the whole prompt when an answer follows", "Use another base model.")
        end = end_token_id(tokenizer)
        labels = tuple((*ids[common:], end) for ids in whole)
        unknown = getattr(tokenizer, "unk_token_id", None)
        cut_off = any(len(label) < 2 for label in labels)
        if len(set(labels)) < len(answers) or cut_off or any(unknown in label for label in labels):
            raise UserError(
                f"the tokenizer cannot tell the answers {answers[0]} to {answers[-1]} apart", "Use another base model."
            )
        return cls(labels, drop=len(alone) - common)

    @property
    def n(self) -> int:
        """How many labels there are."""
        return len(self.labels)

    @cached_property
    def flat(self) -> tuple[tuple[int, int], ...]:
        """All choices of all nodes in one row: (index into `nodes`, token id)."""
        return tuple((i, token) for i, node in enumerate(self.nodes) for token in node.choices)

    @cached_property
    def _steps(self) -> npt.NDArray[np.int64]:
        """[N, depth] indices into `flat`; ``len(flat)`` stands for "no choice here"."""
        position = {(self.nodes[i].path, token): at for at, (i, token) in enumerate(self.flat)}
        depth = max(len(label) for label in self.labels)
        steps = np.full((self.n, depth), len(self.flat), dtype=np.int64)
        for row, label in enumerate(self.labels):
            for d, token in enumerate(label):
                steps[row, d] = position.get((label[:d], token), len(self.flat))
        return steps

    def log_probs(self, logits: npt.ArrayLike) -> Float32:
        """Log-probabilities of the labels; they sum to one.

        Args:
            logits: [..., len(flat)] logits or log-probabilities of `flat`; any common offset within a node cancels out.

        Returns:
            float32 [..., N].
        """
        values = np.asarray(logits, dtype=np.float32)
        if values.shape[-1:] != (len(self.flat),):
            raise ValueError(f"expected {len(self.flat)} logits per prompt, got shape {values.shape}")
        parts, start = [], 0
        for node in self.nodes:
            part = values[..., start : start + len(node.choices)]
            part = part - part.max(axis=-1, keepdims=True)
            parts.append(part - np.log(np.exp(part).sum(axis=-1, keepdims=True)))
            start += len(node.choices)
        parts.append(np.zeros((*values.shape[:-1], 1), dtype=np.float32))
        # `take` lays each prompt's steps side by side: they are added in one order, however many prompts there are.
        result: Float32 = np.concatenate(parts, axis=-1).take(self._steps, axis=-1).sum(axis=-1)
        return result

    @cached_property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """Paths that lead to a node and lie on the way to no other; read behind a prompt they show every inner node."""
        paths = [node.path for node in self.nodes if node.path]
        return tuple(p for p in paths if not any(len(q) > len(p) and q[: len(p)] == p for q in paths))

    @cached_property
    def chain_lengths(self) -> tuple[int, ...]:
        """Tokens of each of `chains`."""
        return tuple(map(len, self.chains))

    @cached_property
    def chained(self) -> npt.NDArray[np.int64]:
        """Tokens of `chains` in a row."""
        return np.array([token for chain in self.chains for token in chain], dtype=np.int64)

    @cached_property
    def node_at(self) -> tuple[int, ...]:
        """For each node, whose output is read: 0 is the prompt's last token, then the tokens of `chains` in a row."""
        places: dict[tuple[int, ...], int] = {(): 0}
        at = 0
        for chain in self.chains:
            for depth in range(1, len(chain) + 1):
                at += 1
                places.setdefault(chain[:depth], at)
        return tuple(places[node.path] for node in self.nodes)

    @cached_property
    def tree(self) -> Tree:
        """The tokens that a model must read after the prompt to see every node at once."""
        paths = sorted(
            {node.path[:d] for node in self.nodes for d in range(1, len(node.path) + 1)}, key=lambda p: (len(p), p)
        )
        index = {path: i for i, path in enumerate(paths)}
        return Tree(
            tokens=tuple(path[-1] for path in paths),
            parents=tuple(index.get(path[:-1], -1) for path in paths),
            depths=tuple(len(path) for path in paths),
            node_at=tuple(index.get(node.path, -1) for node in self.nodes),
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """Tokens appended to a prompt as a tree: each sees the prompt, its ancestors and itself.

    Attributes:
        tokens: Token ids, parents before children.
        parents: Index of each token's parent, -1 for the prompt's last token.
        depths: 1 for a child of the prompt.
        node_at: For each of the trie's nodes, the token whose output is read, -1 for the prompt's last token.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    node_at: tuple[int, ...]

    def visible(self) -> npt.NDArray[np.bool_]:
        """[T, T]: whether token i sees token j."""
        sees = np.eye(len(self.tokens), dtype=bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                sees[i] |= sees[parent]
        return sees


def end_token_id(tokenizer: Any) -> int:
    """The token that ends an answer: what the chat template writes after it, else the tokenizer's end-of-sequence.

    Raises:
        UserError: the tokenizer has neither.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if template := chat_template(tokenizer):
        ids = _ids(tokenizer, template.after_answer)
        if ids and ids[0] in tokenizer.all_special_ids:
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token", "Set eos_token in its tokenizer_config.json.")
    return int(tokenizer.eos_token_id)


def _ids(tokenizer: Any, text: str) -> list[int]:
    # The chat template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length
