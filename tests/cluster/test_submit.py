"""Submitting to clusters that are not quite up, and past proxies; against a stand-in for Ray's HTTP server.

What a user would lose: a batch of jobs that were submitted a few seconds too early, and the reason.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.runtime_env.packaging import _dir_travel

from vlrank import submit
from vlrank.config import PrepareConfig, RetrieveConfig, ServeConfig
from vlrank.errors import UserError
from vlrank.recipes.recipe import RunConfig, steps_of

ROOT = Path(__file__).resolve().parents[2]


class Head(ThreadingHTTPServer):
    """Answers as a head whose agent needs some more requests to come up."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.submitted: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Head

    def log_message(self, *_: object) -> None:
        return

    def answer(self, code: int, body: object) -> None:
        text = json.dumps(body).encode() if code == 200 else str(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if self.path.startswith("/api/version"):
            facts = {"version": "4", "ray_version": ray.__version__, "ray_commit": ray.__commit__, "session_name": "s"}
            self.answer(200, facts)
        elif self.path.startswith("/api/jobs"):
            self.answer(200, [])
        else:
            self.answer(200, {})

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.refusals > 0:
            self.server.refusals -= 1
            self.answer(500, "No available agent to submit job, please try again later.")
        else:
            self.server.submitted.append(job)
            self.answer(200, {"job_id": None, "submission_id": job["submission_id"]})


@pytest.fixture
def head() -> Iterator[Head]:
    server = Head(refusals=2)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def send(head: Head) -> tuple[str, bool]:
    return submit.submit("retrieve", RetrieveConfig(dataset="/data/shop", method="popularity"), address=head.url)


def test_a_head_that_has_just_started_is_waited_for(head: Head) -> None:
    name, fresh = send(head)
    assert fresh
    assert [job["submission_id"] for job in head.submitted] == [name]


def test_a_recipe_is_one_job_with_its_paths_taken_from_the_shared_folder(head: Head) -> None:
    stages = [{"prepare": "shop", "reviews": ["${raw}/r.csv"]}, {"retrieve": "knn", "dataset": "shop"}]
    recipe = RunConfig(out="made", settings={"raw": "raw"}, stages=stages)
    name, _ = submit.submit("run", recipe, address=head.url, workdir="/data")
    (job,) = head.submitted
    assert name.startswith("vlrank-run-")
    assert job["entrypoint"] == "python -m vlrank.jobs run job.yaml"
    sent = RunConfig(**json.loads(job["metadata"]["config"]))
    assert [step.config for step in steps_of(sent)] == [
        PrepareConfig(reviews=("/data/raw/r.csv",), out="/data/made/shop"),
        RetrieveConfig(dataset="/data/made/shop", name="knn"),
    ]


def test_a_model_can_be_deployed_again_after_another(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job has succeeded, and what it deployed is gone: any other stage would have nothing left to do."""
    ended = SimpleNamespace(status="SUCCEEDED", submission_id="before")
    monkeypatch.setattr(submit, "attempts", lambda client, name: [(1, ended)])
    assert send(head) == ("before", False)
    name, fresh = submit.submit("serve", ServeConfig(model="/runs/a", dataset="/data/shop"), address=head.url)
    assert fresh
    assert name.endswith("-2")


def test_a_cluster_without_an_agent_is_given_up_with_a_message(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "AGENT_S", 0.5)
    head.refusals = 100
    with pytest.raises(UserError, match="no agent that takes jobs") as refused:
        send(head)
    assert "--dashboard-agent-listen-port" in str(refused.value)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_is_not_asked_for_this_machine(head: Head, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "intranet.example")
    assert send(head)[1]


def test_a_proxy_in_the_way_of_another_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://name:secret@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"through the proxy of http_proxy \(no_proxy=head.example") as refused:
        submit.connect("http://head.example:8265")
    assert "secret" not in str(refused.value)


def test_a_checkout_ships_its_code_and_nothing_else(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` uploads what .rayignore leaves: neither .git nor data that lies around."""
    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    code, ballast = ["configs/a.yaml", "jobs/train.py", "platform/vlrank/cli.py"], [".git/objects/x", "data/b.pt"]
    for name in [*code, *ballast]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    shipped: list[Path] = []
    _dir_travel(tmp_path, [], shipped.append, include_gitignore=True)
    files = sorted(str(path.relative_to(tmp_path)) for path in shipped if path.is_file())
    assert files == code
