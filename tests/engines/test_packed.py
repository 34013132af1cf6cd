"""One pass over a packed row must say exactly what asking for every answer in full would say."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.prompting.tokenizers_zoo import ZOO
from vlrank.config import EngineConfig, RankingConfig
from vlrank.engines import packed, packed_attention, packed_load
from vlrank.engines.models import open_model
from vlrank.engines.packed import PackedScorer
from vlrank.engines.packed_attention import Context, RowAttention, documents_behind
from vlrank.engines.packed_live import score_rows
from vlrank.engines.packed_load import disagreement, open_packed
from vlrank.engines.packed_model import PackedModel, Unsuited
from vlrank.engines.packed_prefixes import PrefixMemory
from vlrank.engines.packed_rows import PackedRow, PromptTokens, RowShape
from vlrank.engines.resources import EngineDied, engine_name, ranking_engine
from vlrank.engines.scoring import open_scorer
from vlrank.engines.transformers_scorer import TransformersScorer, load_model, score_labels
from vlrank.errors import UserError
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.prompting.labels import LabelTrie
from vlrank.prompting.modes import mode_spec
from vlrank.reranking.ranker import PromptMaker, Ranker, Ranking, UserLists

from .brute_force import RANKING, brute_force, picture_items, text_items

PACKED = EngineConfig(name="packed")


@pytest.fixture(scope="module")
def text(tiny_text_model: Path) -> Iterator[tuple[PackedScorer, Encoder, Any]]:
    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    scorer = open_packed(open_model(tiny_text_model), PACKED, encoder)
    yield scorer, encoder, load_model(open_model(tiny_text_model))
    scorer.close()


@pytest.fixture(scope="module")
def vision(tiny_vision_model: Path) -> Iterator[tuple[PackedScorer, Encoder, Any]]:
    encoder = Encoder.load(tiny_vision_model, mode_spec("raw_image"), RANKING)
    scorer = open_packed(open_model(tiny_vision_model), PACKED, encoder)
    yield scorer, encoder, load_model(open_model(tiny_vision_model))
    scorer.close()


def scored(scorer: PackedScorer, encoder: Encoder, prompts: Sequence[Encoded]) -> list[np.ndarray]:
    answers = scorer.score_labels(encoder, prompts)
    assert not [answer for answer in answers if isinstance(answer, Exception)]
    return answers  # type: ignore[return-value]


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 9, 10, 20, 99, 100])
def test_agrees_with_brute_force(
    text: tuple[PackedScorer, Encoder, Any], judged: dict[int, tuple[Encoded, np.ndarray]], n: int
) -> None:
    scorer, encoder, _ = text
    encoded, expected = judged[n]
    for cut in (0, 1, encoder.shared(encoded.ids), len(encoded.ids) - 1):
        [scores] = scored(scorer, encoder, [replace(encoded, prefix=cut)])
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("writes", sorted(ZOO))
def test_every_way_to_write_numbers_agrees_with_brute_force(writes: str) -> None:
    """Single digits, numbers of one token, numbers joined with the end of the prompt."""
    from vlrank.demo.base_models import text_model

    encoder = Encoder(ZOO[writes](), mode_spec("semantic_summary_small"), RANKING)
    model = text_model(encoder.tokenizer).eval()
    scorer = PackedScorer(PackedModel.of(model, keep=True))
    for n in (3, 12, 100):
        encoded = encoder.encode(text_items(2, "old"), text_items(n))
        [scores] = scored(scorer, encoder, [encoded])
        np.testing.assert_allclose(scores, brute_force(model, encoder, encoded), atol=1e-5)
    scorer.close()


@pytest.mark.parametrize("n", [5, 9, 10, 20])
def test_pictures_agree_with_brute_force(vision: tuple[PackedScorer, Encoder, Any], tmp_path: Path, n: int) -> None:
    scorer, encoder, model = vision
    encoded = encoder.encode(text_items(3, "old"), picture_items(n, tmp_path))
    expected = brute_force(model, encoder, encoded)
    for _ in range(2):  # computed, then from the cache
        [scores] = scored(scorer, encoder, [encoded])
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    [scores] = scored(scorer, encoder, [replace(encoded, prefix=encoder.shared(encoded.ids))])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_picture_is_read_and_computed_once(
    vision: tuple[PackedScorer, Encoder, Any], tiny_vision_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, _, _ = vision
    encoder = Encoder.load(tiny_vision_model, mode_spec("raw_image"), RANKING)
    pictures = picture_items(8, tmp_path)
    prompts = [encoder.encode([], pictures[i : i + 4]) for i in range(4)]
    read: list[str] = []
    patches = encoder.patches
    monkeypatch.setattr(encoder, "patches", lambda path: (read.append(path), patches(path))[1])
    first = scored(scorer, encoder, prompts)
    again = scored(scorer, encoder, prompts)
    assert sorted(read) == sorted({path for prompt in prompts for path in prompt.image_paths})
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_features_that_do_not_fit_are_computed_again(vision: tuple[PackedScorer, Encoder, Any], tmp_path: Path) -> None:
    alone, encoder, model = vision
    prompts = [encoder.encode([], picture_items(4, tmp_path)[i:]) for i in range(2)]
    scorer = PackedScorer(PackedModel.of(model, keep=True), feature_bytes=(0, 1))
    for a, b in zip(scored(scorer, encoder, prompts * 2), scored(alone, encoder, prompts * 2), strict=True):
        np.testing.assert_array_equal(a, b)
    assert scorer.features is not None
    assert len(scorer.features._kept) == 1
    scorer.close()


def test_captions_on_a_vision_model_agree_with_brute_force(
    vision: tuple[PackedScorer, Encoder, Any], tiny_vision_model: Path
) -> None:
    scorer, _, model = vision
    encoder = Encoder.load(tiny_vision_model, mode_spec("caption"), RANKING)
    batch = [encoder.encode(text_items(k, "old"), text_items(n)) for k, n in [(0, 12), (6, 25)]]
    for encoded, scores in zip(batch, scored(scorer, encoder, batch), strict=True):
        np.testing.assert_allclose(scores, brute_force(model, encoder, encoded), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_other_architectures_agree_with_brute_force(kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    encoder = Encoder(ZOO["digits"](), mode_spec("semantic_summary_small"), RANKING)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(encoder.tokenizer)}
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model: Any = (
        LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, attention_bias=True))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**sizes))
    )
    for parameter in model.parameters():  # biases begin at zero
        torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    scorer = PackedScorer(PackedModel.of(model, keep=True))
    encoded = encoder.encode(text_items(4, "old"), text_items(20))
    [scores] = scored(scorer, encoder, [encoded])
    np.testing.assert_allclose(scores, brute_force(model, encoder, encoded), atol=1e-5)
    scorer.close()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_prompt_are_left_to_transformers(kind: str) -> None:
    """Neighbours in a row or batch would change a prompt's scores."""
    from transformers import LlamaConfig, LlamaForCausalLM

    encoder = Encoder(ZOO["digits"](), mode_spec("semantic_summary_small"), RANKING)
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": len(encoder.tokenizer), "max_position_embeddings": 64}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)).eval()
    with pytest.raises(Unsuited, match=f"{kind} rotary positions"):
        PackedModel.of(model)
    if kind == "dynamic":
        return  # transformers keeps the frequencies of the longest prompt so far
    batch = [encoder.encode(text_items(k, "old"), text_items(n)) for k, n in [(0, 2), (30, 12)]]
    for prompt, scores in zip(batch, score_labels(model, encoder, batch), strict=True):
        np.testing.assert_array_equal(scores, score_labels(model, encoder, [prompt])[0])


# ---- rows ------------------------------------------------------------------------------------------------------------


def documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `varlen.flash2_lse` computes, document by document; what no document holds is no number."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[1::-1], torch.nan)
    for (a, b), (c, d) in zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True):
        assert b - a <= longest_query
        assert d - c <= longest_key
        assert d > c or a == b, "kernels differ in what queries without keys give"
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * scaling
        if causal:
            assert b - a == d - c
            scores = scores.masked_fill(~torch.tril(torch.ones(b - a, d - c, dtype=torch.bool)), -torch.inf)
        lse[:, a:b] = scores.logsumexp(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[c:d])
    return out, lse


@pytest.fixture
def gpu_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, with kernels that follow their contract to the letter."""
    monkeypatch.setattr("vlrank.engines.packed.kernel_for", lambda *_: documents)


TRIES = [LabelTrie(tuple((*map(int, str(i)), 99) for i in range(1, n + 1))) for n in (1, 2, 9, 20, 100)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from(TRIES), st.integers(0, 2)), min_size=1, max_size=6),
    st.integers(0, 700),
    st.booleans(),
)
def test_two_ways_of_attention_agree(shapes: list[tuple[int, LabelTrie, int]], filling: int, prefixed: bool) -> None:
    """Any prompts, tries, prefixes and filling: joined calls of kernels give what one softmax over a mask gives."""
    shapes = sorted(shapes, key=lambda shape: shape[2])
    prompts = [PromptTokens(np.zeros(n, dtype=np.int64), np.tile(np.arange(n), (3, 1)), trie) for n, trie, _ in shapes]
    row = PackedRow(prompts, sum(p.size for p in prompts) + filling, sum(p.reads for p in prompts) + 3)
    assert len(row.ids) == row.size == row.positions.shape[1] == row.segments[-1]
    used = sorted({prefix for *_, prefix in shapes})
    context = Context(
        np.cumsum([0, *(5 + 3 * i for i in used)]), np.array([used.index(prefix) for *_, prefix in shapes])
    )
    generator = torch.Generator().manual_seed(row.size)
    q, k, v = (torch.randn(row.size, heads, 8, generator=generator) for heads in (4, 2, 2))
    held = tuple(torch.randn(context.bounds[-1], 2, 8, generator=generator) for _ in range(2))
    ways = []
    behind = (documents_behind(row, context)["context"],) if prefixed else ()
    for kernel, shape in ((None, None), (documents, None), (documents, RowShape.of(row, *behind))):
        attention = RowAttention(row, torch.device("cpu"), 0.3, kernel, context if prefixed else None, shape)
        prefix: Any = held if prefixed else None
        reads = sum(p.reads for p in prompts)
        ways.append((attention(q, k, v, prefix)[: row.filled], attention.at_reads(q, k, v, prefix)[:reads]))
    for way in ways[1:]:
        for masked, joined in zip(ways[0], way, strict=True):
            torch.testing.assert_close(joined, masked, atol=1e-5, rtol=1e-5)
    whole, reads_only = ways[0]
    torch.testing.assert_close(whole[attention.tensors["reads"][:reads]], reads_only, atol=1e-5, rtol=1e-5)


def test_rows_of_many_prompts_agree_with_prompts_alone(text: tuple[PackedScorer, Encoder, Any], gpu_rows: None) -> None:
    """Neighbours, filling and shared prefixes change nothing; nor does how a row was left or right of another."""
    alone, encoder, model = text
    prompts = [encoder.encode(text_items(k, "old"), text_items(n)) for k, n in [(3, 20), (1, 12), (9, 5), (2, 100)]]
    shuffled = [encoder.encode(text_items(4, "old"), text_items(20)[:: (-1) ** i]) for i in range(2)]
    prompts += [replace(prompt, prefix=encoder.shared(prompt.ids)) for prompt in (*shuffled, prompts[0])]
    expected = scored(alone, encoder, prompts)
    scorer = PackedScorer(PackedModel.of(model, keep=True), row_tokens=4096)
    for order in (range(len(prompts)), [6, 2, 4, 1, 5, 3, 0]):
        together = scored(scorer, encoder, [prompts[i] for i in order])
        for i, scores in zip(order, together, strict=True):
            np.testing.assert_allclose(scores, expected[i], atol=1e-5)
    scorer.close()


def replayed(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """As a CUDA graph: the same launches again, on what lies in the same places now."""
    hidden = compute().clone()
    return lambda: hidden.copy_(compute()), hidden


def test_recorded_passes_give_what_prompts_get_alone(
    text: tuple[PackedScorer, Encoder, Any], gpu_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU all rows but the first two of a shape are replays, with other prompts in the same places."""
    alone, encoder, model = text
    monkeypatch.setattr(packed, "_READS", 64)
    scorer = PackedScorer(PackedModel.of(model, keep=True), row_tokens=2048, record=replayed)
    counts = [20, 12, 5, 30, 2, 9, 20, 15, 3, 25]
    prompts = [encoder.encode(text_items(i % 4, "old"), text_items(n, f"item {i}")) for i, n in enumerate(counts)]
    expected = scored(alone, encoder, prompts)
    for _ in range(2):
        for i, prompt in enumerate(prompts):
            np.testing.assert_allclose(scored(scorer, encoder, [prompt])[0], expected[i], atol=1e-5)
    for several in (prompts, prompts[::-1]):
        for prompt, scores in zip(several, scored(scorer, encoder, several), strict=True):
            np.testing.assert_allclose(scores, expected[prompts.index(prompt)], atol=1e-5)
    assert 0 < len(scorer._passes.recordings.kept) < 8
    scorer.close()


def test_recorded_passes_find_the_prefixes_of_their_own_row(
    text: tuple[PackedScorer, Encoder, Any], gpu_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that write prefixes and rows that continue them are replays too, wherever in memory the prefixes lie."""
    alone, encoder, model = text
    monkeypatch.setattr(packed, "_READS", 64)
    whole = PackedModel.of(model, keep=True)
    # Room for three or four prefixes: most are written over by others and computed again.
    scorer = PackedScorer(whole, row_tokens=2048, record=replayed, prefix_bytes=250 * PrefixMemory.token_bytes(whole))
    prompts = []
    for user in range(9):
        seen = text_items(2 + user % 3, f"user {user}")
        orders = [text_items(9, f"item {user}")[:: (-1) ** i] for i in range(2)]
        prompts += [encoder.encode(seen, order) for order in orders]
    prompts = [replace(prompt, prefix=encoder.shared(prompt.ids)) for prompt in prompts]
    expected = scored(alone, encoder, prompts)
    for order in np.random.default_rng(0).permutation(len(prompts) * 2).reshape(-1, 3) % len(prompts):
        for i, scores in zip(order, scored(scorer, encoder, [prompts[i] for i in order]), strict=True):
            np.testing.assert_allclose(scores, expected[i], atol=1e-5)
    shapes = list(scorer._passes.recordings.kept)
    assert any(shape.context for shape in shapes), "rows that continue prefixes"
    assert any(not shape.reads for shape in shapes), "rows of prefixes"
    assert 0 < len(scorer._prefixes) < 9
    # More than the memory holds: it gives way to a larger one.
    for prompt, scores in zip(prompts, scored(scorer, encoder, prompts), strict=True):
        np.testing.assert_allclose(scores, expected[prompts.index(prompt)], atol=1e-5)
    assert scorer._memory is not None
    assert scorer._memory.tokens > 250
    scorer.close()


def test_recorded_passes_see_the_pictures_of_their_own_row(
    vision: tuple[PackedScorer, Encoder, Any], tmp_path: Path, gpu_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, encoder, model = vision
    monkeypatch.setattr(packed, "_READS", 64)
    items = picture_items(9, tmp_path)
    prompts = [encoder.encode(text_items(2, "old"), items[i : i + 3]) for i in range(6)]
    scorer = PackedScorer(PackedModel.of(model, keep=True), row_tokens=2048, record=replayed)
    for prompt, scores in zip(prompts, scored(alone, encoder, prompts), strict=True):
        np.testing.assert_allclose(scored(scorer, encoder, [prompt])[0], scores, atol=1e-5)
    assert scorer._passes.recordings.kept
    scorer.close()


def test_what_cannot_be_recorded_is_launched_step_by_step(
    text: tuple[PackedScorer, Encoder, Any], gpu_rows: None, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, encoder, model = text

    def refused(compute: Callable[[], torch.Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    scorer = PackedScorer(PackedModel.of(model, keep=True), row_tokens=1024, record=refused)
    prompt = encoder.encode([], text_items(5))
    [expected] = scored(alone, encoder, [prompt])
    for _ in range(4):
        np.testing.assert_allclose(scored(scorer, encoder, [prompt])[0], expected, atol=1e-5)
    assert capsys.readouterr().out.count("cannot be recorded") == 1
    scorer.close()


def test_rows_are_short_only_where_that_changes_no_bit(
    text: tuple[PackedScorer, Encoder, Any], gpu_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries choose kernels by the size of a product; one user's scores must not depend on who else asks."""
    alone, encoder, model = text
    monkeypatch.setattr(packed, "_READS", 64)
    scorer = PackedScorer(PackedModel.of(model, keep=True), row_tokens=4096, record=replayed)
    sizes: list[int] = []
    compute = PackedModel.forward

    def forward(model: PackedModel, attention: RowAttention, *rest: Any) -> torch.Tensor:
        sizes.append(attention.row.size)
        return compute(model, attention, *rest) * (1 + 2**-20 * (attention.row.size == 512))

    monkeypatch.setattr(PackedModel, "forward", forward)
    assert scorer.shorten_rows([512, 1024, 2048], like=4096) == [1024, 2048]
    sizes.clear()
    prompts = [encoder.encode([], text_items(5, f"item {i}")) for i in range(20)]
    for few in (prompts[:1], prompts):
        for a, b in zip(scored(scorer, encoder, few), scored(alone, encoder, few), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert {1024, 4096} <= set(sizes)
    scorer.close()


def test_a_prompt_longer_than_a_row_gets_a_longer_one(text: tuple[PackedScorer, Encoder, Any], gpu_rows: None) -> None:
    alone, encoder, model = text
    long = encoder.encode(text_items(4, "a rather long name of an item"), text_items(100, "and another long name"))
    scorer = PackedScorer(PackedModel.of(model, keep=True), row_tokens=1024)
    assert len(long.ids) > 1024
    short = encoder.encode([], text_items(5))
    for a, b in zip(scored(scorer, encoder, [short, long]), scored(alone, encoder, [short, long]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    scorer.close()


def test_a_trie_with_more_nodes_than_a_row_has_places_is_read_too(
    text: tuple[PackedScorer, Encoder, Any], gpu_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, encoder, model = text
    monkeypatch.setattr(packed, "_READS", 16)
    trie = LabelTrie(tuple((a, b, 2) for a in range(10, 40) for b in (5, 6)))
    assert len(trie.nodes) > packed.row_reads(1024)
    encoded = replace(encoder.encode([], text_items(3)), trie=trie)
    scorer = PackedScorer(PackedModel.of(model, keep=True), row_tokens=1024)
    [scores] = scored(scorer, encoder, [encoded])
    np.testing.assert_allclose(scores, scored(alone, encoder, [encoded])[0], atol=1e-5)
    scorer.close()


def test_a_prefix_is_computed_once(text: tuple[PackedScorer, Encoder, Any]) -> None:
    scorer, encoder, _ = text
    prompts = [encoder.encode(text_items(8, "seen"), text_items(12)[i:]) for i in range(3)]
    shared = encoder.shared(prompts[0].ids)
    assert all(encoder.shared(prompt.ids) == shared for prompt in prompts)
    assert len({tuple(prompt.ids[:shared]) for prompt in prompts}) == 1
    before = scorer.cached_tokens
    scored(scorer, encoder, [replace(prompt, prefix=shared) for prompt in prompts])
    assert scorer.cached_tokens - before == 2 * shared


def test_prefixes_that_do_not_fit_are_computed_again(text: tuple[PackedScorer, Encoder, Any]) -> None:
    alone, encoder, model = text
    prompts = [encoder.encode(text_items(8, f"seen {i}"), text_items(12)) for i in range(4)]
    prompts = [replace(prompt, prefix=encoder.shared(prompt.ids)) for prompt in prompts]
    scorer = PackedScorer(PackedModel.of(model, keep=True), prefix_bytes=1)
    for a, b in zip(scored(scorer, encoder, prompts * 2), scored(alone, encoder, prompts * 2), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(scorer._prefixes) == 1
    scorer.close()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 6), st.integers(1, 3), st.lists(st.integers(1, 14), min_size=1, max_size=3), st.integers(0, 99))
def test_windows_and_permutations_rank_as_transformers_does(
    text: tuple[PackedScorer, Encoder, Any], window: int, permutations: int, sizes: list[int], seed: int
) -> None:
    """Whatever is shared between a user's prompts, and in whatever order they come."""
    scorer, encoder, model = text
    ranking = RankingConfig(
        window=window, stride=max(1, window // 2), permutations=permutations, max_prompt_tokens=65536
    )
    meta = dict(enumerate(text_items(40, "item"), start=1))
    prompts = PromptMaker(encoder, encoder.spec, ranking, meta)
    rng = np.random.default_rng(seed)
    users = [UserLists(rng.permutation(9)[:5] + 1, (rng.permutation(30)[:n] + 10).tolist(), seed) for n in sizes]
    users = [replace(user, prompts=prompts.first(user)) if i % 2 else user for i, user in enumerate(users)]
    reference = TransformersScorer.__new__(TransformersScorer)
    reference.config, reference.batch_tokens, reference.model = EngineConfig(), 16384, model
    given_, expected = (Ranker(engine, prompts).rank(users) for engine in (scorer, reference))
    for a, b in zip(given_, expected, strict=True):
        assert isinstance(a, Ranking)
        assert isinstance(b, Ranking)
        assert a.item_ids == b.item_ids
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
        assert (a.prompts, a.tokens) == (b.prompts, b.tokens)


# ---- the same bits ---------------------------------------------------------------------------------------------------


def test_scores_are_the_same_bits_in_any_company(vision: tuple[PackedScorer, Encoder, Any], tmp_path: Path) -> None:
    """Shard, order, number of engines and a resume decide who is scored beside whom, and nothing else."""
    scorer, encoder, model = vision
    items = picture_items(25, tmp_path)
    prompts = [encoder.encode(text_items(i % 5, "old"), items[i : i + 12]) for i in range(12)]
    prompts += [replace(prompt, prefix=encoder.shared(prompt.ids)) for prompt in prompts[:6]]
    together = scored(scorer, encoder, prompts)
    other = PackedScorer(PackedModel.of(model, keep=True))
    for i in np.random.default_rng(0).permutation(len(prompts)).tolist():
        [alone] = scored(other, encoder, [prompts[i]])
        np.testing.assert_array_equal(alone, together[i])
    other.close()


def test_callers_from_several_threads_get_their_own_answers(text: tuple[PackedScorer, Encoder, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    scorer, encoder, _ = text
    prompts = [encoder.encode(text_items(i, "old"), text_items(5 + i)) for i in range(8)]
    expected = [scored(scorer, encoder, [prompt])[0] for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: scored(scorer, encoder, prompts), range(8)):
            for a, b in zip(scores, expected, strict=True):
                np.testing.assert_array_equal(a, b)


# ---- weights ---------------------------------------------------------------------------------------------------------


def adapted(folder: Path, out: Path, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, **options)
    model = get_peft_model(load_model(open_model(folder)), lora).eval()
    model.save_pretrained(out)
    return model


def test_an_adapter_is_merged(text: tuple[PackedScorer, Encoder, Any], tiny_text_model: Path, tmp_path: Path) -> None:
    plain, encoder, _ = text
    model = adapted(tiny_text_model, tmp_path)
    encoded = encoder.encode([], text_items(12))
    scorer = open_packed(open_model(tmp_path), PACKED, encoder)
    [scores] = scored(scorer, encoder, [encoded])
    np.testing.assert_allclose(scores, brute_force(model, encoder, encoded), atol=1e-5)
    assert np.abs(scores - scored(plain, encoder, [encoded])[0]).max() > 1e-3
    scorer.close()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 128, "use_rslora": True},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["norm", "input_layernorm"]},
        {"bias": "all"},
        {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_as_other_programs_make_them_are_merged(
    text: tuple[PackedScorer, Encoder, Any], tiny_text_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    plain, encoder, _ = text
    torch.manual_seed(1)
    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})
    model = get_peft_model(load_model(open_model(tiny_text_model)), lora).eval()
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_" not in name:  # copies of the base's
            torch.nn.init.normal_(weight, mean=float(weight.detach().mean()), std=0.3)
    model.save_pretrained(tmp_path)
    encoded = encoder.encode([], text_items(12))
    scorer = open_packed(open_model(tmp_path), PACKED, encoder)
    [scores] = scored(scorer, encoder, [encoded])
    np.testing.assert_allclose(scores, brute_force(model, encoder, encoded), atol=1e-4)
    assert np.abs(scores - scored(plain, encoder, [encoded])[0]).max() > 1e-3
    scorer.close()


def test_an_adapter_that_cannot_be_merged_is_served_by_transformers(
    text: tuple[PackedScorer, Encoder, Any], tiny_text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, encoder, _ = text
    adapted(tiny_text_model, tmp_path, use_dora=True)
    with pytest.raises(UserError, match=r"cannot rank with .* is a variant of LoRA"):
        open_scorer(open_model(tmp_path), PACKED, encoder)


def test_four_bit_weights_are_the_numbers_that_training_computed_with(
    text: tuple[PackedScorer, Encoder, Any], tiny_text_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _, encoder, _ = text
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_text_model, quantization_config=quantised, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    layer = model.model.layers[0].self_attn.q_proj
    packed = PackedModel.of(model, keep=True)
    shown = layer(torch.eye(64, dtype=torch.bfloat16)).T
    # bitsandbytes rounds its scales in some kernels and not in others: one step of bfloat16.
    torch.testing.assert_close(packed.layers[0].qkv.weight[: len(shown)], shown, atol=0, rtol=2**-6)
    exact = EngineConfig(name="packed", dtype="bfloat16")
    encoded = encoder.encode([], text_items(12))
    scorer = open_packed(open_model(tmp_path), exact, encoder)
    [plain] = scored(scorer, encoder, [encoded])
    assert np.isfinite(plain).all()
    scorer.close()
    # and as `vlrank train` leaves it: an adapter beside a base in 4 bits
    adapter = tmp_path / "adapter"
    adapted(tmp_path, adapter)
    scorer = open_packed(open_model(adapter), exact, encoder)
    [merged] = scored(scorer, encoder, [encoded])
    assert np.abs(merged - plain).max() > 1e-3
    scorer.close()


def test_bfloat16_scores_are_no_ties(text: tuple[PackedScorer, Encoder, Any], tiny_text_model: Path) -> None:
    alone, encoder, _ = text
    scorer = open_packed(open_model(tiny_text_model), EngineConfig(name="packed", dtype="bfloat16"), encoder)
    encoded = encoder.encode([], text_items(9))
    [scores] = scored(scorer, encoder, [encoded])
    np.testing.assert_allclose(scores, scored(alone, encoder, [encoded])[0], atol=0.15)
    assert len(set(scores.tolist())) == 9
    scorer.close()


def test_float8_matrices_are_rounded_row_by_row(text: tuple[PackedScorer, Encoder, Any]) -> None:
    """Three bits of a number are kept, whatever the size of the row that it is in."""
    _, _, model = text
    packed = PackedModel.of(model, keep=True)
    for layer, rounded in zip(packed.layers, packed.float8().layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            exact, matrix = getattr(layer, name).weight, getattr(rounded, name)
            restored = matrix.weight.float() * matrix.scale.T
            small = exact.abs().amax(1, keepdim=True) / 448
            assert ((restored - exact).abs() <= exact.abs() / 16 + small).all()


# ---- the model in training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [None, documents])
def test_a_model_in_training_is_read_as_it_stands(
    tiny_text_model: Path, tmp_path: Path, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation and ranking have to mean the same by a score, adapters merged or not."""
    monkeypatch.setattr("vlrank.engines.packed_live.kernel_for", lambda *_: kernel)
    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    model = adapted(tiny_text_model, tmp_path)
    batch = [encoder.encode(text_items(k, "old"), text_items(n)) for k, n in [(0, 12), (3, 1), (6, 25), (2, 5)]]
    expected = [brute_force(model, encoder, prompt) for prompt in batch]
    model.train()
    attention = model.config._attn_implementation
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        given = score_rows(model, encoder, batch)
    assert model.training
    assert model.config._attn_implementation == attention
    for scores, exact in zip(given, expected, strict=True):
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, exact, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = score_rows(model, encoder, batch)
    for scores, exact in zip(rounded, expected, strict=True):
        np.testing.assert_allclose(scores, exact, atol=0.15)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_validation_follows_the_weights_without_copies(kind: str, tiny_text_model: Path, tmp_path: Path) -> None:
    """A step later the scores are those of the new weights; biases and layers without adapters count too."""
    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    model = adapted(tiny_text_model, tmp_path)
    if kind == "qwen2":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=len(encoder.tokenizer)))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    shared = PackedModel.of(model, live=True)
    prompt = encoder.encode(text_items(3, "old"), text_items(12))
    for _ in range(2):
        [scores] = score_rows(model, encoder, [prompt], rows_only=True)
        np.testing.assert_allclose(scores, brute_force(model, encoder, prompt), atol=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert shared.embeddings.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_model_of_another_head_or_type_runs_its_own_forward_pass(tiny_text_model: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    model, prompt = adapted(tiny_text_model, tmp_path), encoder.encode(text_items(3, "old"), text_items(12))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(Unsuited, match="rounded"):
        score_rows(model, encoder, [prompt], rows_only=True)


def test_an_adapted_head_is_read_in_training_too(tiny_text_model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    options = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(load_model(open_model(tiny_text_model)), options).eval()
    batch = [encoder.encode(text_items(k, "old"), text_items(n)) for k, n in [(0, 12), (3, 5)]]
    for prompt, scores in zip(batch, score_rows(model, encoder, batch), strict=True):
        np.testing.assert_allclose(scores, brute_force(model, encoder, prompt), atol=1e-5)


def test_pictures_of_a_model_in_training(vision: tuple[PackedScorer, Encoder, Any], tmp_path: Path) -> None:
    _, encoder, model = vision
    pictures = picture_items(25, tmp_path)
    batch = [encoder.encode(text_items(k, "old"), pictures[:n]) for k, n in [(0, 3), (7, 25), (2, 11)]]
    for prompt, scores in zip(batch, score_rows(model, encoder, batch), strict=True):
        np.testing.assert_allclose(scores, brute_force(model, encoder, prompt), atol=1e-5)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_unreadable_picture_costs_its_own_prompt(
    vision: tuple[PackedScorer, Encoder, Any], tiny_vision_model: Path, tmp_path: Path
) -> None:
    scorer, _, model = vision
    encoder = Encoder.load(tiny_vision_model, mode_spec("raw_image"), RANKING)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    good = encoder.encode([], picture_items(3, tmp_path / "a"))
    bad = encoder.encode([], picture_items(3, tmp_path / "b"))
    (tmp_path / "b" / "1.png").unlink()
    failed, scores = scorer.score_labels(encoder, [bad, good])
    assert isinstance(failed, OSError)
    np.testing.assert_allclose(scores, brute_force(model, encoder, good), atol=1e-5)


def test_a_full_gpu_halves_the_rows_and_goes_on(
    text: tuple[PackedScorer, Encoder, Any], gpu_rows: None, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, encoder, model = text
    packed = PackedModel.of(model, keep=True)
    room, before = 10_000, packed.before

    def limited(x: torch.Tensor, *rest: Any) -> Any:
        if len(x) > room:
            raise torch.OutOfMemoryError("full")
        return before(x, *rest)

    packed.before = limited
    scorer = PackedScorer(packed, row_tokens=32768)
    prompts = [encoder.encode(text_items(i % 3, "old"), text_items(12)) for i in range(40)]
    for a, b in zip(scored(scorer, encoder, prompts), scored(alone, encoder, prompts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert scorer.row_tokens == 8192
    assert "rows of 8192 tokens" in capsys.readouterr().out
    room = 1  # and where nothing fits, the prompts say so and the engine lives
    [failed] = scorer.score_labels(encoder, prompts[:1])
    assert isinstance(failed, torch.OutOfMemoryError)
    room = 10_000
    scored(scorer, encoder, prompts[:1])
    scorer.close()


def test_an_engine_that_fails_answers_everybody(text: tuple[PackedScorer, Encoder, Any]) -> None:
    """Callers would wait for ever."""
    _, encoder, model = text
    packed = PackedModel.of(model, keep=True)

    def broken(*_: Any) -> Any:
        raise AssertionError("a fault of the engine")

    packed.before = broken
    scorer = PackedScorer(packed)
    with pytest.raises(EngineDied, match="a fault of the engine"):
        scorer.score_labels(encoder, [encoder.encode([], text_items(3))])
    with pytest.raises(EngineDied, match="closed"):
        scorer.score_labels(encoder, [encoder.encode([], text_items(3))])


def test_who_ranks_texts_needs_no_second_vision_tower(
    vision: tuple[PackedScorer, Encoder, Any], tiny_vision_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 2B model in 8 GiB: its tower in float32 beside it was what did not fit."""
    model, encoder = vision[2], Encoder.load(tiny_vision_model, mode_spec("caption"), RANKING)
    tower = model.model.visual

    def copied(memo: Any) -> Any:
        raise AssertionError("the tower was copied")

    monkeypatch.setattr(tower, "__deepcopy__", copied, raising=False)
    assert disagreement(model, encoder) < 1e-4
    assert model.model.visual is tower
    with pytest.raises(AssertionError, match="copied"):
        disagreement(model, vision[1])


def test_a_model_that_computes_something_else_goes_to_transformers(
    text: tuple[PackedScorer, Encoder, Any],
    tiny_text_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as one whose library has changed since this was written."""
    monkeypatch.setenv("VLRANK_CACHE", str(tmp_path))  # where nothing is known of its layout
    _, encoder, model = text
    assert disagreement(model, encoder) < 1e-4
    rotated = packed_load.PackedModel.of

    def other(model: Any, **options: Any) -> PackedModel:
        return replace(rotated(model, **options), scaling=0.1)

    monkeypatch.setattr(packed_load.PackedModel, "of", other)
    with pytest.raises(Unsuited, match="differ from those of transformers"):
        open_packed(open_model(tiny_text_model), PACKED, encoder)
    monkeypatch.setattr("vlrank.engines.resources.importlib.util.find_spec", lambda name: None)
    scorer = open_scorer(open_model(tiny_text_model), EngineConfig(), encoder)
    assert isinstance(scorer, TransformersScorer)
    assert "is ranked by transformers, not by packed: its scores differ" in capsys.readouterr().err
    scorer.close()


def test_auto_leaves_to_others_what_packed_cannot_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(config: dict[str, Any], **engine: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return ranking_engine(EngineConfig(**engine), open_model(tmp_path))

    qwen = {"model_type": "qwen3"}
    monkeypatch.setattr("vlrank.engines.resources.importlib.util.find_spec", lambda name: True)
    assert chosen(qwen) == "packed"
    assert chosen(qwen | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}) == "packed"
    assert chosen(qwen | {"quantization_config": {"quant_method": "gptq"}}) == "vllm"
    assert chosen({"model_type": "gemma3_text"}) == "vllm"
    assert chosen(qwen, tensor_parallel_size=2) == "vllm"
    assert chosen(qwen, engine_kwargs={"max_num_seqs": 8}) == "vllm"
    assert chosen(qwen, name="transformers") == "transformers"
    monkeypatch.setattr("vlrank.engines.resources.importlib.util.find_spec", lambda name: None)
    assert chosen({"model_type": "gemma3_text"}) == "transformers"
    with pytest.raises(UserError, match="ranks and writes no texts"):
        engine_name(PACKED)


def test_four_bit_weights_need_room_for_what_they_become(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 1000)
    assert packed_load._bytes_needed(str(tmp_path)) == 1000 + 2**31
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    assert packed_load._bytes_needed(str(tmp_path)) == 4000 + 2**31
    assert packed_load._bytes_needed("Qwen/Qwen3-0.6B") == 0


def test_the_kernels_are_compared_before_they_are_used() -> None:
    assert packed_attention.kernel_for(2, 1, 32, torch.device("cpu"), torch.bfloat16) is None
    assert packed_attention.kernel_for(2, 1, 32, torch.device("cuda"), torch.float32) is None
