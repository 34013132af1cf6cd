"""The real server, asked over HTTP: its answers, and what happens when clients, replicas or the server itself go."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import polars as pl
import psutil
import pytest

from tests.processes import Program, command_line, of_living
from tests.serving.conftest import SUMMARIES, run_folder
from vlrank.data.dataset import Dataset
from vlrank.prompting.negatives import sampled_candidates

pytestmark = pytest.mark.stack
VLRANK = (sys.executable, "-m", "vlrank")
WITH_TOKEN = {"RAY_AUTH_MODE": "token"}
BODY = {"user": 7, "candidates": list(range(1, 21))}


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(dataset: Dataset, run: Path, port: int) -> Iterator[Program]:
    program = Program(*VLRANK, "serve", run, "--dataset", dataset.path, "--port", port, "prompt_workers=1")
    program.wait_for(lambda: "serving at" in program.output, "the server")
    yield program
    program.lose_power()


@pytest.fixture(scope="module")
def ray(server: Program) -> str:
    """The address of the server's Ray, as the command says it."""
    [address] = re.findall(r"ray\.address=[\d.:]+", server.output)
    return str(address)


@pytest.fixture(scope="module")
def client(server: Program, port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        yield client


def ranking(client: httpx.Client, body: dict[str, Any] = BODY) -> list[tuple[int, float]]:
    answer = client.post("/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    return [(place["id"], place["score"]) for place in answer.json()["ranking"]]


def metric(client: httpx.Client, name: str) -> float:
    """Of all replicas together."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[ {{]", line))


def test_scores_are_those_of_the_bulk_job_to_the_last_bit(
    client: httpx.Client, dataset: Dataset, run: Path, ray: str, tmp_path: Path
) -> None:
    out = tmp_path / "r.parquet"
    words = ["--model", run, "--out", out, "limit=12", ray]
    Program(*VLRANK, "rerank", dataset.path, *words, env=WITH_TOKEN).finish()
    histories, items = dataset.histories("test"), np.arange(1, dataset.n_items + 1)
    rows = pl.read_parquet(out).select("user_id", "item_ids", "scores").iter_rows()
    bulk = {user: list(zip(*row, strict=True)) for user, *row in rows}
    assert len(bulk) == 12

    def asked(user: int) -> list[tuple[int, float]]:
        history, target = histories[user]
        candidates = sampled_candidates(user, history, target, items, 19, 0)[0]
        return ranking(client, {"user": user, "history": history, "candidates": [int(item) for item in candidates]})

    with ThreadPoolExecutor(12) as crowd:
        assert dict(zip(bulk, crowd.map(asked, bulk), strict=True)) == bulk


def test_coheres_own_client_gets_a_ranking(client: httpx.Client, port: int) -> None:
    with httpx.Client(trust_env=False) as transport:
        theirs = cohere.ClientV2("no key", base_url=f"http://127.0.0.1:{port}", httpx_client=transport)
        documents = ["a red mug", "a blue mug", "a green lamp"]
        answer = theirs.rerank(model="first", query="a red vase\na red lamp", documents=documents, top_n=2)
    ours = client.post("/v1/rerank", json={"query": "a red vase\na red lamp", "documents": documents}).json()
    expected = [(place["index"], place["relevance_score"]) for place in ours["results"][:2]]
    assert [(place.index, place.relevance_score) for place in answer.results] == expected


def test_a_client_that_leaves_gives_its_place_back(client: httpx.Client, server: Program, port: int) -> None:
    content = httpx.Request("POST", f"http://127.0.0.1:{port}/v1/rank", json=BODY)
    lines = [b"POST /v1/rank HTTP/1.1", *(name + b": " + value for name, value in content.headers.raw)]
    message = b"\r\n".join(lines) + b"\r\n\r\n" + content.content

    def some_have_left() -> bool:
        sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for connection in sockets:
            connection.sendall(message)
        for connection in sockets:
            connection.close()
        text = client.get("/metrics").text
        return 'status="left"' in text

    server.wait_for(some_have_left, "a request without an answer")
    server.wait_for(lambda: metric(client, "vlrank_admitted_requests") == 0, "the end of all requests")
    assert len(ranking(client)) == 20


def test_more_requests_than_the_queue_holds_are_sent_away_and_the_others_ranked(client: httpx.Client) -> None:
    """Clients that come again after `Retry-After` seconds get through; a queue without an end would let all wait."""
    body = BODY | {"candidates": [1, 2]}
    right = client.post("/v1/rank", json=body).json()["ranking"]

    async def crowd(size: int) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120, trust_env=False, limits=limits) as own:
            return await asyncio.gather(*(own.post("/v1/rank", json=body) for _ in range(size)))

    answers = asyncio.run(crowd(400))
    assert Counter(answer.status_code for answer in answers).keys() == {200, 429}
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["ranking"] == right
        else:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["message"]
    assert client.post("/v1/rank", json=body).json()["ranking"] == right


def replicas(server: Program) -> list[psutil.Process]:
    return [process for process, line in of_living(server.family(), command_line).items() if "ServeReplica" in line]


@contextmanager
def crowd(client: httpx.Client, clients: int) -> Iterator[list[httpx.Response]]:
    """The answers that clients get who ask for the whole time of the block without a pause."""
    seen: list[httpx.Response] = []
    enough = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as own:
            while not enough.is_set():
                seen.append(own.post("/v1/rank", json=BODY))

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(keep_asking) for _ in range(clients)]
        try:
            yield seen
        finally:
            enough.set()
    for each in asking:
        each.result()


def kill_under_load(client: httpx.Client, server: Program) -> None:
    """A replica with requests in work gets SIGKILL; all clients get the answer of before, sooner or later."""
    before = ranking(client)
    with crowd(client, 16) as seen:
        server.wait_for(lambda: len(seen) > 32, "answers")
        first = replicas(server)[0]
        first.kill()
        psutil.wait_procs([first], timeout=60)
        answered = len(seen)
        server.wait_for(lambda: len(seen) > answered + 64, "answers of another replica")
    assert not [answer.text for answer in seen if answer.status_code != 200]
    places = [[(place["id"], place["score"]) for place in answer.json()["ranking"]] for answer in seen]
    assert places == [before] * len(seen)


def test_a_killed_replica_costs_its_clients_time_and_no_answer(client: httpx.Client, server: Program) -> None:
    """It is the only one: what it had in work waits for its successor."""
    kill_under_load(client, server)


def test_serves_own_refusals_are_json_too(client: httpx.Client) -> None:
    answer = client.post("/v1/rank", json=BODY, headers={"X-Request-Timeout-Seconds": "0.000001"})
    assert (answer.status_code, "timed out" in answer.json()["message"]) == (408, True)


def test_another_model_takes_over_without_a_gap(
    client: httpx.Client, server: Program, dataset: Dataset, tiny_text_model: Path, ray: str, port: int, tmp_path: Path
) -> None:
    """It is loaded beside the old one, which answers meanwhile: with another history the scores change."""
    other = run_folder(tmp_path / "second", tiny_text_model, SUMMARIES, max_history=1)
    before = ranking(client)

    def model(answer: httpx.Response) -> tuple[int, str]:
        return answer.status_code, answer.json().get("model", answer.text)

    with crowd(client, 2) as seen:
        words = ["--dataset", dataset.path, "--port", port, "replicas=2", ray]
        Program(*VLRANK, "serve", other, *words, env=WITH_TOKEN).finish()
        server.wait_for(lambda: model(seen[-1]) == (200, "second"), "an answer of the second model")
    assert {model(answer) for answer in seen} == {(200, "first"), (200, "second")}
    assert ranking(client) != before


def test_the_other_replica_answers_what_a_killed_one_had_in_work(client: httpx.Client, server: Program) -> None:
    server.wait_for(lambda: len(replicas(server)) == 2, "the end of the first model's replica")
    kill_under_load(client, server)


def test_a_signal_ends_the_server_after_the_answers_it_owes(server: Program, client: httpx.Client) -> None:
    def asked(_: int) -> int:
        try:
            return together.post("/v1/rank", json=BODY).status_code
        except httpx.ConnectError:
            return 0  # came when the server had ended

    family = server.family()
    limits = httpx.Limits(max_connections=48)  # one client: making 48 takes longer than the server's end
    with (
        httpx.Client(base_url=client.base_url, timeout=60, trust_env=False, limits=limits) as together,
        ThreadPoolExecutor(48) as crowd,
    ):
        asking = [crowd.submit(asked, i) for i in range(48)]
        server.wait_for(lambda: sum(each.done() for each in asking) > 4, "the first answers")
        server.process.send_signal(signal.SIGTERM)
        statuses = [each.result() for each in asking]
    assert set(statuses) <= {200, 503, 0}, "answered, or refused because the server ends"
    assert statuses.count(200) > 0
    said = server.finish(0)
    assert "accepted requests are answered" in said
    for noise in ("Traceback", "SIGTERM", "Failed to connect to GCS"):
        assert noise not in said, said
    assert not [process for process in family if process.is_running()], said
