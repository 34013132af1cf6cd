"""Requests and answers, with a real engine on a tiny model and without Ray."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import numpy as np
import polars as pl
import pytest

from tests.serving.conftest import run_folder
from vlrank.config import ServeConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.engines.packed import PackedScorer
from vlrank.errors import UserError
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.reranking.plan import open_ranking_model
from vlrank.reranking.ranker import Ranking, UserLists, user_seed
from vlrank.serving import run as stage
from vlrank.serving.app import build_app
from vlrank.serving.catalogue import Catalogue
from vlrank.serving.limits import TOKEN
from vlrank.serving.messages import Refused
from vlrank.serving.metrics import Metrics, merged
from vlrank.serving.service import Service, open_service

RUNNER = asyncio.Runner()  # a service belongs to one event loop
CANDIDATES = [3, 14, 15, 9, 26, 5, 35, 8]


def config(run: Path, dataset: Dataset, **more: Any) -> ServeConfig:
    return load_config(ServeConfig, model=str(run), dataset=dataset.path, max_body_mb=0.5, **more)


def opened(settings: ServeConfig) -> Service:
    return open_service(settings, open_ranking_model(settings)[0])


@pytest.fixture(scope="module")
def service(run: Path, dataset: Dataset) -> Iterator[Service]:
    service = opened(config(run, dataset))
    yield service
    service.close()


@pytest.fixture(scope="module")
def shop_window(
    tiny_vision_model: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A model that sees pictures; two that came with requests are kept."""
    folder = tmp_path_factory.mktemp("runs") / "seeing"
    run = run_folder(folder, tiny_vision_model, "raw_image", max_image_pixels=1024)
    service = opened(config(run, dataset, inline_pictures=2))
    yield service
    service.close()


def ask(service: Service, *bodies: Any, path: str = "/v1/rank", token: str | None = None, **options: Any) -> Any:
    """The answers to requests that are sent at the same time; one answer for one request."""

    async def told() -> list[httpx.Response]:
        async def metrics() -> bytes:
            return merged({"one": service.metrics.text()})

        transport = httpx.ASGITransport(build_app(service, token, metrics), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://vlrank") as client:
            if not bodies:
                return [await client.get(path, **options)]
            sent = [body if not isinstance(body, dict) else json.dumps(body).encode() for body in bodies]
            headers = {"Content-Type": "application/json", **options.pop("headers", {})}
            return await asyncio.gather(*(client.post(path, content=body, headers=headers) for body in sent))

    answers = RUNNER.run(told())
    return answers if len(answers) > 1 else answers[0]


def scores(answer: httpx.Response) -> dict[Any, float]:
    assert answer.status_code == 200, answer.text
    return {place["id"]: place["score"] for place in answer.json()["ranking"]}


def bulk(service: Service, user: int, history: list[int], candidates: list[int]) -> dict[int, float]:
    [ranking] = service._ranker.rank([UserLists(history, candidates, user_seed(0, user))])
    assert isinstance(ranking, Ranking)
    return dict(zip(ranking.item_ids, ranking.scores.tolist(), strict=True))


# ---- rankings --------------------------------------------------------------------------------------------------------


def test_every_user_of_a_crowd_gets_the_scores_of_being_alone(service: Service) -> None:
    users = list(range(1, 25))
    answers = ask(service, *({"user": user, "candidates": CANDIDATES} for user in users))
    for user, answer in zip(users, answers, strict=True):
        assert scores(answer) == bulk(service, user, service.catalogue.sequence(user), CANDIDATES)


def test_ids_may_be_the_sources_and_come_back_as_they_were_given(service: Service, dataset: Dataset) -> None:
    names = dataset.items()["source_id"].to_list()
    by_number = ask(service, {"user": 7, "candidates": CANDIDATES})
    named = {"user": dataset.sequences()["source_user"][6], "candidates": [names[item - 1] for item in CANDIDATES]}
    by_name = ask(service, named)
    assert scores(by_name) == {names[item - 1]: score for item, score in scores(by_number).items()}
    assert [place["index"] for place in by_name.json()["ranking"]] == [
        CANDIDATES.index(place["id"]) for place in by_number.json()["ranking"]
    ]


def test_items_sent_with_a_request_rank_as_those_of_the_dataset(service: Service) -> None:
    meta = service.catalogue.meta

    def sent(item: int) -> dict[str, Any]:
        return {"id": f"mine-{item}", "text": meta[item]["text"], "semantic_summary": meta[item]["semantic_summary"]}

    known = ask(service, {"history": [1, 2], "candidates": CANDIDATES})
    inline = ask(service, {"history": [sent(1), 2], "candidates": [sent(item) for item in CANDIDATES]})
    assert scores(inline) == {f"mine-{item}": score for item, score in scores(known).items()}


def test_an_answer_is_as_long_as_asked_and_sums_to_one(service: Service) -> None:
    body = {"user": 3, "candidates": CANDIDATES}
    whole = ask(service, body).json()
    assert sum(place["probability"] for place in whole["ranking"]) == pytest.approx(1, abs=1e-6)
    for place in whole["ranking"]:
        assert place["probability"] == np.exp(place["score"])
    best = ask(service, {**body, "top_n": 2, "return_items": True}).json()
    assert [place["id"] for place in best["ranking"]] == [place["id"] for place in whole["ranking"]][:2]
    assert best["ranking"][0]["item"]["text"] == service.catalogue.meta[best["ranking"][0]["id"]]["text"]
    assert (whole["model"], whole["mode"], whole["prompts"]) == ("first", "semantic_summary_small", 2)


def test_cohere_and_jina_clients_get_the_same_probabilities(service: Service) -> None:
    """Their documents are texts: one that says what the mode would show makes the same prompt."""
    meta = service.catalogue.meta
    texts = [f"{meta[item]['text'][:20]} (Summary: {meta[item]['semantic_summary']})" for item in (1, *CANDIDATES)]
    answer = ask(service, {"query": texts[0], "documents": texts[1:], "top_n": 3, "model": "any"}, path="/v2/rerank")
    items = [{"text": text.partition(" (")[0], "semantic_summary": text[:-1].partition(": ")[2]} for text in texts]
    expected = ask(service, {"history": items[:1], "candidates": items[1:], "top_n": 3}).json()["ranking"]
    assert [(place["index"], place["relevance_score"]) for place in answer.json()["results"]] == [
        (place["index"], place["probability"]) for place in expected
    ]
    texts_only = {"query": "a mug\n\na lamp", "documents": ["a vase", {"text": "a vase"}], "return_documents": True}
    documents = [place["document"] for place in ask(service, texts_only, path="/v1/rerank").json()["results"]]
    assert documents == [{"text": "a vase"}] * 2, "documents may lack what the mode shows, and repeat each other"


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"user": 7, "candidates": [3, 999]}, 422, "candidates.1: the dataset has no item 999"),
        ({"user": 7, "candidates": ["nothing"]}, 422, "no item 'nothing'"),
        ({"user": 7, "candidates": [True]}, 422, "candidates.0"),
        ({"user": 7, "candidates": [0]}, 422, "no item 0"),
        ({"user": 0, "candidates": [3]}, 422, "no user 0"),
        ({"user": "nobody", "candidates": [3]}, 422, "no user 'nobody'"),
        ({"history": [61], "candidates": [3]}, 422, "history.0"),
        ({"user": 7, "candidates": [3, 4, 3]}, 422, "candidates.2: the same item as candidates.0"),
        ({"user": 7, "candidates": []}, 422, "candidates"),
        ({"user": 7, "candidates": list(range(1, 52))}, 422, "at most 50"),
        ({"user": 7, "candidates": [{"text": "a mug"}]}, 422, "candidates.0: mode semantic_summary_small shows"),
        ({"user": 7, "candidates": [3], "mode": "caption"}, 422, "not 'caption'"),
        ({"user": 7, "candidates": [3], "topn": 2}, 422, "topn"),
        ({"candidates": [3]}, 422, "give `user`, `history` or both"),
        (b'{"user": 7, "candidates": [3', 422, "the body is not JSON"),
        (b"[1, 2]", 422, "the body is not a JSON object"),
        (b"", 422, "required"),
        (json.dumps({"user": 7, "candidates": ["x" * 600_000]}).encode(), 413, "larger than 500000 bytes"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(service: Service, body: Any, status: int, named: str) -> None:
    answer = ask(service, body)
    assert answer.status_code == status
    assert named in answer.json()["message"]
    assert service.batcher.admitted == 0


def test_a_large_body_is_refused_when_its_length_is_not_given(service: Service) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 10_000

    answer = ask(service, pieces())
    assert answer.status_code == 413


def test_too_many_tokens_are_refused(run: Path, dataset: Dataset) -> None:
    service = opened(config(run, dataset, ranking={"max_prompt_tokens": 64}))
    answer = ask(service, {"user": 7, "candidates": CANDIDATES})
    service.close()
    assert answer.status_code == 422
    assert "more than max_prompt_tokens 64" in answer.json()["message"]


def test_only_those_with_the_token_may_ask(service: Service) -> None:
    body = {"user": 7, "candidates": [3, 4]}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert ask(service, body, token="secret", headers=headers).status_code == 401
        assert ask(service, path="/metrics", token="secret", headers=headers).status_code == 401
    assert ask(service, body, token="secret", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert ask(service, path="/health", token="secret").status_code == 200, "for a load balancer"


def test_a_server_that_ends_takes_no_more(service: Service) -> None:
    service.draining = True
    try:
        assert ask(service, {"user": 7, "candidates": [3, 4]}).status_code == 503
        health = ask(service, path="/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
    finally:
        service.draining = False


def test_an_engine_that_has_died_is_told_from_a_bad_request(
    run: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Serve replaces the replica; the client may send the same again."""
    service = opened(config(run, dataset))
    body = {"user": 7, "candidates": [3, 4]}
    engine = service._ranker.engine
    with monkeypatch.context() as patched:
        patched.setattr(engine, "score_labels", lambda encoder, requests: [MemoryError("full")] * len(requests))
        answer = ask(service, body)
        assert (answer.status_code, service.died) == (500, None)
        assert "MemoryError: full" in answer.json()["message"]
    assert ask(service, body).status_code == 200, "one prompt's failure is not the engine's"
    engine.close()
    answer = ask(service, body)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert service.died is not None
    assert service.batcher.admitted == 0


def test_a_mistake_of_ours_is_said_in_the_form_of_a_refusal(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(service.catalogue), "user", lambda *_: 1 // 0)
    answer = ask(service, {"user": 7, "candidates": [3, 4]})
    assert (answer.status_code, answer.json()) == (500, {"message": ANY})
    assert "ZeroDivisionError" in answer.json()["message"]


def test_a_model_without_finite_scores_is_not_served(
    run: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when it is loaded, and the model before it goes on."""

    def nothing(self: PackedScorer, encoder: Encoder, requests: list[Encoded]) -> list[Any]:
        return [np.full(request.n_candidates, np.nan, dtype=np.float32) for request in requests]

    monkeypatch.setattr(PackedScorer, "score_labels", nothing)
    with pytest.raises(UserError, match="not finite"):
        opened(config(run, dataset, engine={"name": "packed"}))


def test_the_routes_are_described(service: Service) -> None:
    paths = ask(service, path="/openapi.json").json()["paths"]
    assert {"/v1/rank", "/v1/rerank", "/v2/rerank", "/health", "/metrics"} <= set(paths)
    assert "swagger" in ask(service, path="/docs").text


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture_of(service: Service, item: int) -> bytes:
    return Path(str(service.catalogue.meta[item]["image_path"])).read_bytes()


def test_a_picture_sent_with_a_request_is_seen_as_that_of_the_dataset(shop_window: Service) -> None:
    texts = {item: shop_window.catalogue.meta[item]["text"] for item in CANDIDATES}
    known = ask(shop_window, {"user": 7, "candidates": CANDIDATES})
    pictures = {item: base64.b64encode(picture_of(shop_window, item)).decode() for item in CANDIDATES}
    items = [{"id": item, "text": texts[item], "picture": pictures[item]} for item in CANDIDATES]
    assert scores(ask(shop_window, {"user": 7, "candidates": items})) == scores(known)
    items[0]["picture"] = f"data:image/png;base64,{items[0]['picture']}"
    assert scores(ask(shop_window, {"user": 7, "candidates": items})) == scores(known)


def test_pictures_of_past_requests_do_not_pile_up(shop_window: Service) -> None:
    for item in CANDIDATES:
        sent = {"text": "it", "picture": base64.b64encode(picture_of(shop_window, item)).decode()}
        assert ask(shop_window, {"user": 7, "candidates": [1, sent]}).status_code == 200
    folder = Path(shop_window.pictures._folder.name)
    assert len(list(folder.iterdir())) == 2
    encoder, checked = shop_window._ranker.prompts.encoder, shop_window._ranker.prompts.pictures
    for known in (encoder._grids, encoder._pixels.values, checked or {}):
        assert len([path for path in known if path.startswith(str(folder))]) <= 2


@pytest.mark.parametrize(
    ("picture", "named"),
    [
        (None, "shows the item's picture, which is missing"),
        ("http://127.0.0.1:1/a.jpg", "PrivateAddress"),
        ("http://[::1]/a.jpg", "PrivateAddress"),
        ("file:///etc/passwd", "only http and https"),
        ("/etc/passwd", "NotAPicture"),
        ("data:image/png,abc", "without base64"),
        (base64.b64encode(b"<html></html>").decode(), "an HTML page"),
        ("@large", "at most 1000 are allowed"),
    ],
)
def test_a_picture_that_must_not_be_shown_is_refused(
    shop_window: Service, monkeypatch: pytest.MonkeyPatch, picture: str | None, named: str
) -> None:
    limits = shop_window.config.pictures.model_copy(update={"max_bytes": 1000})
    monkeypatch.setattr(shop_window.pictures, "_limits", limits)
    if picture == "@large":
        picture = base64.b64encode(bytes(2000)).decode()
    answer = ask(shop_window, {"user": 7, "candidates": [1, {"text": "it", "picture": picture}]})
    assert answer.status_code == 422
    assert "candidates.1" in answer.json()["message"]
    assert named in answer.json()["message"]


def test_a_broken_picture_of_the_dataset_costs_its_item_alone(shop_window: Service) -> None:
    place = Path(str(shop_window.catalogue.meta[50]["image_path"]))
    intact = place.read_bytes()
    place.write_bytes(intact[:40])
    try:
        with pytest.warns(UserWarning, match="item 50"):
            answer = ask(shop_window, {"user": 7, "candidates": [1, 50, 2]})
    finally:
        place.write_bytes(intact)
    assert set(scores(answer)) == {1, 2}
    assert answer.json()["dropped"] == [1]


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_tell_what_was_asked_and_answered(service: Service) -> None:
    before = service.answered
    ask(service, {"user": 7, "candidates": [3, 4]}, {"user": 7, "candidates": [999]})
    text = ask(service, path="/metrics").text
    assert service.answered == before + 1
    for line in (
        'vlrank_requests_total{path="/v1/rank",replica="one",status="422"}',
        'vlrank_request_seconds_count{path="/v1/rank",replica="one"}',
        'vlrank_waiting_requests{replica="one"} 0.0',
        'vlrank_users_in_work_count{replica="one"}',
        'vlrank_prompts_total{replica="one"}',
        'process_resident_memory_bytes{replica="one"}',
    ):
        assert line in text


def test_all_replicas_stand_in_one_text() -> None:
    first, second = Metrics(), Metrics()
    first.requests.labels("/v1/rank", "200").inc(2)
    second.requests.labels("/v1/rank", "200").inc(5)
    text = merged({"a": first.text(), "b": second.text()}).decode()
    assert 'vlrank_requests_total{path="/v1/rank",replica="a",status="200"} 2.0' in text
    assert 'vlrank_requests_total{path="/v1/rank",replica="b",status="200"} 5.0' in text
    assert text.count("# TYPE vlrank_requests_total counter") == 1


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_served(run: Path, dataset: Dataset) -> None:
    summary = stage.dry_run(config(run, dataset, replicas=2))
    assert summary.counts == {"replicas": 2}
    assert summary.lines["address"] == "http://127.0.0.1:8000"


def test_a_serve_config_file_names_the_application(run: Path, dataset: Dataset) -> None:
    args = {"model": str(run), "dataset": str(dataset.path), "replicas": 3, "engine": {"gpus": 0.5}, "drain_s": 7}
    deployment = stage.application_of(args)._bound_deployment  # where no node is up yet, as when a cluster starts
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options == {"num_cpus": 1, "num_gpus": 0.5}
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
    assert deployment._deployment_config.max_surge_percent == 100
    with pytest.raises(UserError, match="did you mean `replicas`"):
        stage.application_of(args | {"replica": 3})


def test_mistakes_are_found_before_anything_starts(
    run: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(UserError, match=TOKEN):
        stage.run(config(run, dataset, host="0.0.0.0"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be listened on"):
            stage.run(config(run, dataset, port=taken.getsockname()[1]))
    with pytest.raises(UserError, match="give replicas=2, not"):
        config(run, dataset, engine={"replicas": 2})
    with pytest.raises(UserError, match="does not exist"):
        stage.run(config(run / "nowhere", dataset))


def test_short_rows_stay_the_default_where_another_key_of_the_engine_is_set(run: Path, dataset: Dataset) -> None:
    assert config(run, dataset, engine={"gpus": 0.5}).engine.row_tokens == 16384
    assert config(run, dataset, pictures={"max_bytes": 5}).pictures.attempts == 1


def test_numbers_of_the_source_are_told_from_the_datasets_own() -> None:
    catalogue = Catalogue({1: {"text": "T"}}, {"7001": 1}, {"1002": 1}, pl.Series([[1]]))
    with pytest.raises(Refused, match=r'no user 1002 \(users 1 to 1; "1002" in quotes is one of the source\)'):
        catalogue.user(1002)
    with pytest.raises(Refused, match=r'no item 7001 \(items 1 to 1; "7001" in quotes is one of the source\)'):
        catalogue.item(7001, "candidates.0")
    with pytest.raises(Refused, match=r"no item 9 \(items 1 to 1\)"):
        catalogue.item(9, "candidates.0")
    assert (catalogue.user("1002"), catalogue.item("7001", "candidates.0")) == (1, 1)
