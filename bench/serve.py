"""`vlrank serve` under load, beside a plain FastAPI loop around transformers and beside the bulk job, on this machine.

    python bench/serve.py --model RUN --dataset DATASET --out bench/results/serve_cpu.json --rate 10
    python bench/serve.py --model QWEN3_0.6B_FOLDER --out bench/results/serve_h100.json --rate 50 --requests 10000

Without --dataset items and users are made up, with prompts of about 2,000 tokens. Four parts: `steady` asks at a
fixed rate and says p50 and p99; `saturated` lets all clients ask without a pause; `hostile` adds clients that leave,
broken JSON, huge bodies and a killed replica, checks every answer against the one that was given alone, and watches
memory; then the first two for the rival, which is what one writes in an afternoon: the same prompts, scored one at a
time by transformers' forward pass. At the end `vlrank rerank` over the same users. All traffic stays on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.processes import command_line, family, of_living

from generate import machine
from rerank import Shape, copy_model, job, make_dataset, write_random_weights

MADE_UP = Shape("semantic_summary_small", words=14, summary_words=28, history=20)
LEAVES, BROKEN, HUGE = 0.05, 0.05, 0.01
"""Shares of hostile requests."""


@dataclass(slots=True)
class Load:
    """What was asked and answered.

    Attributes:
        seconds: Of every answered request.
        statuses: How often each status came; `left` and `lost` (the connection broke) are no statuses of HTTP.
        wrong: Rankings that differ from the one given alone, and refusals of another status or form than expected.
        unanswered: Honest requests that got no ranking.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    unanswered: int = 0

    def figures(self, took: float) -> dict[str, Any]:
        """Percentiles in milliseconds, and answers per second."""
        found: dict[str, Any] = {"requests": sum(self.statuses.values()), "statuses": dict(self.statuses)}
        if self.seconds:
            for share in (50, 90, 99):
                found[f"p{share}_ms"] = round(float(np.percentile(self.seconds, share)) * 1000, 2)
        found["answers_per_second"] = round(self.statuses["200"] / took, 2)
        return found | {"wrong": self.wrong, "unanswered": self.unanswered}


def requests_of(dataset: Path, users: int, candidates: int) -> list[dict[str, Any]]:
    """The requests that `vlrank rerank` would make of the first test users."""
    from vlrank.data.dataset import Dataset
    from vlrank.prompting.negatives import sampled_candidates

    data = Dataset.open(dataset)
    items = np.arange(1, data.n_items + 1)
    bodies = []
    for user, (history, target) in sorted(data.histories("test").items())[:users]:
        listed = sampled_candidates(user, history, target, items, candidates - 1, 0)[0]
        bodies.append({"user": user, "history": history, "candidates": [int(item) for item in listed]})
    return bodies


def is_refusal(content: bytes) -> bool:
    """Whether an error has the form that clients parse."""
    with contextlib.suppress(ValueError):
        return list(json.loads(content)) == ["message"]
    return False


class Clients:
    """Asks one address; checks answers once `expected` is known."""

    def __init__(self, address: str, bodies: list[dict[str, Any]]) -> None:
        self.address, self.bodies = address, bodies
        self.expected: list[Any] = [None] * len(bodies)

    async def __aenter__(self) -> Clients:
        import aiohttp

        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120)
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.session.close()

    async def ask(self, number: int, load: Load) -> None:
        """One honest request."""
        import aiohttp

        at = number % len(self.bodies)
        began = time.perf_counter()
        try:
            async with self.session.post(f"{self.address}/v1/rank", json=self.bodies[at]) as answer:
                content = await answer.read()
                load.statuses[str(answer.status)] += 1
        except (aiohttp.ClientError, OSError):
            load.statuses["lost"] += 1
            load.unanswered += 1
            return
        if answer.status != 200:
            load.unanswered += 1
            load.wrong += not is_refusal(content)
            return
        load.seconds.append(time.perf_counter() - began)
        ranking = json.loads(content)["ranking"]
        if self.expected[at] is None:
            self.expected[at] = ranking
        load.wrong += ranking != self.expected[at]

    async def hostile(self, number: int, load: Load, rng: random.Random) -> None:
        """A request of which some are none."""
        import aiohttp

        kind = rng.random()
        url = f"{self.address}/v1/rank"
        headers = {"Content-Type": "application/json"}
        try:
            if kind < LEAVES:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.random() * 0.02):
                        await self.session.post(url, json=self.bodies[number % len(self.bodies)])
                load.statuses["left"] += 1
            elif kind < LEAVES + BROKEN:
                text = json.dumps(self.bodies[number % len(self.bodies)])
                async with self.session.post(url, data=text[: len(text) // 2], headers=headers) as answer:
                    load.wrong += answer.status not in (422, 429) or not is_refusal(await answer.read())
                    load.statuses[str(answer.status)] += 1
            elif kind < LEAVES + BROKEN + HUGE:
                async with self.session.post(url, data=b" " * 20_000_000, headers=headers) as answer:
                    load.wrong += answer.status != 413 or not is_refusal(await answer.read())
                    load.statuses[str(answer.status)] += 1
            else:
                await self.ask(number, load)
        except (aiohttp.ClientError, OSError):
            load.statuses["lost"] += 1

    async def all_alone(self) -> None:
        """Every request once, one after the other: what is expected from here on."""
        load = Load()
        for number in range(len(self.bodies)):
            await self.ask(number, load)
        assert load.statuses == {"200": len(self.bodies)}, load.statuses

    async def steady(self, rate: float, count: int) -> dict[str, Any]:
        """At a fixed rate, whatever the answers take."""
        load, began, asked = Load(), time.perf_counter(), []
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            asked.append(asyncio.create_task(self.ask(number, load)))
        await asyncio.gather(*asked)
        return {"rate": rate} | load.figures(time.perf_counter() - began)

    async def crowd(
        self, clients: int, count: int, ask: Callable[[int, Load], Awaitable[None]], most_s: float
    ) -> dict[str, Any]:
        """Clients that ask again as soon as they are answered."""
        load, began, numbers = Load(), time.perf_counter(), iter(range(count))

        async def client() -> None:
            for number in numbers:
                if time.perf_counter() - began > most_s:
                    return
                await ask(number, load)

        await asyncio.gather(*(client() for _ in range(clients)))
        return {"clients": clients} | load.figures(time.perf_counter() - began)


@contextlib.contextmanager
def memory_of(process: psutil.Process, every_s: float = 1.0) -> Iterator[dict[str, list[float]]]:
    """MiB of the server's processes over time, by name; a replica that was replaced begins anew."""
    found: dict[str, list[float]] = {"replica": [], "proxy": [], "controller": []}
    seen: dict[str, int] = {}
    names = {"ServeReplica": "replica", "ProxyActor": "proxy", "ServeController": "controller"}
    done = threading.Event()

    def look() -> None:
        while not done.wait(every_s):
            titled = of_living(family(process.pid), lambda child: (command_line(child), child.memory_info().rss))
            for child, (title, resident) in titled.items():
                for part, name in names.items():
                    if part in title:
                        if seen.setdefault(name, child.pid) != child.pid:
                            seen[name] = child.pid
                            found[name].clear()
                        found[name].append(round(resident / 2**20, 1))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def growth(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Of each process: ten samples, and the last fifth's mean against that of the second."""
    found = {}
    for name, values in samples.items():
        if len(values) >= 10:
            fifth = len(values) // 5
            early, late = np.mean(values[fifth : 2 * fifth]), np.mean(values[-fifth:])
            over_time = values[:: max(1, len(values) // 10)]
            found[name] = {"mib": over_time, "growth_mib": round(float(late - early), 1)}
    return found


def kill_a_replica(process: psutil.Process) -> None:
    """SIGKILL, as when a machine's memory is full."""
    for child, title in of_living(family(process.pid), command_line).items():
        if "ServeReplica" in title and of_living([child], psutil.Process.kill):
            return
    raise SystemExit("there is no replica to kill")


@contextlib.contextmanager
def started(command: list[str], ready: str, most_s: float) -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    """A server process; the facts say how long it took to start and how it ended."""
    facts: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while True:
                output.seek(0)
                text = output.read()
                if re.search(ready, text):
                    break
                if process.poll() is not None or time.monotonic() - began > most_s:
                    raise SystemExit(f"the server did not start:\n{text[-4000:]}")
                time.sleep(0.2)
            facts["seconds_to_start"] = round(time.monotonic() - began, 1)
            yield process, facts
            ended = time.monotonic()
            process.send_signal(signal.SIGTERM)
            facts["exit_code"] = process.wait(120)
            facts["seconds_to_end"] = round(time.monotonic() - ended, 1)
        finally:
            if process.poll() is None:
                process.kill()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ours(options: argparse.Namespace, model: Path, dataset: Path, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """`vlrank serve`: steady, saturated, hostile."""
    port = free_port()
    command = [sys.executable, "-m", "vlrank", "serve", str(model), "--dataset", str(dataset), "--port", str(port)]
    command += settings_of(options)
    result: dict[str, Any] = {"settings": settings_of(options)}

    async def parts(process: psutil.Process) -> None:
        async with Clients(f"http://127.0.0.1:{port}", bodies) as clients:
            await clients.all_alone()
            result["steady"] = await clients.steady(options.rate, int(options.rate * options.steady_s))
            result["saturated"] = await clients.crowd(options.clients, options.requests, clients.ask, options.most_s)
            async with clients.session.get(f"{clients.address}/metrics") as answer:
                result["metrics"] = own_metrics(await answer.text())
            if not options.hostile:
                return
            rng = random.Random(0)
            killer = asyncio.get_running_loop().call_later(options.kill_after_s, kill_a_replica, process)
            with memory_of(process) as samples:
                count, ask = options.hostile_requests, lambda n, load: clients.hostile(n, load, rng)
                result["hostile"] = await clients.crowd(options.clients, count, ask, options.most_s)
                killed = killer.when() < asyncio.get_running_loop().time()
            killer.cancel()
            result["hostile"] |= {"a_replica_was_killed": killed, "memory": growth(samples)}
            async with clients.session.get(f"{clients.address}/metrics") as answer:
                text = await answer.text()
            held = re.findall(r"^vlrank_admitted_requests\{.*\} (\S+)", text, re.M)
            result["hostile"]["requests_held_afterwards"] = sum(map(float, held))

    with started(command, "serving at", options.start_s) as (process, facts):
        asyncio.run(parts(process))
    return result | facts


def own_metrics(text: str) -> dict[str, float]:
    """What the server counted itself, without the buckets of histograms."""
    found = re.findall(r"^(vlrank_\w+(?:\{[^}]*\})?) (\S+)$", text, re.M)
    return {name: float(value) for name, value in found if "_bucket" not in name and "_created" not in name}


def settings_of(options: argparse.Namespace) -> list[str]:
    """What `vlrank serve` and the rival are told of the model."""
    made_up = [f"as_mode={MADE_UP.mode}", "ranking.max_history=20", "ranking.max_item_chars=4000"]
    return [*([] if options.dataset else made_up), *options.settings]


def rival(options: argparse.Namespace, model: Path, dataset: Path, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain loop: the same two loads."""
    port = free_port()
    command = [sys.executable, __file__, "--model", str(model), "--dataset", str(dataset), "--serve_rival", str(port)]
    result: dict[str, Any] = {}

    async def parts() -> None:
        async with Clients(f"http://127.0.0.1:{port}", bodies) as clients:
            await clients.all_alone()
            count = int(options.rate * options.steady_s)
            result["steady"] = await clients.steady(options.rate, count)
            some = options.requests // 4  # it is slow, and has no state that could change
            result["saturated"] = await clients.crowd(options.clients, some, clients.ask, options.most_s)

    with started([*command, *settings_of(options)], "Uvicorn running", options.start_s) as (_, facts):
        asyncio.run(parts())
    return result | {"seconds_to_start": facts["seconds_to_start"]}


def serve_rival(options: argparse.Namespace) -> None:
    """FastAPI, a lock, and transformers' forward pass over one prompt."""
    import threading

    import torch
    import uvicorn
    from fastapi import FastAPI

    from vlrank.config import ServeConfig, load_config
    from vlrank.data.dataset import Dataset
    from vlrank.engines.transformers_scorer import load_model, score_labels
    from vlrank.reranking.plan import open_ranking_model
    from vlrank.reranking.ranker import UserLists, open_prompts

    config = load_config(ServeConfig, model=str(options.model), dataset=options.dataset, overrides=[*options.settings])
    folder, _ = open_ranking_model(config)
    model = load_model(folder, "bfloat16" if torch.cuda.is_available() else "float32").eval()
    prompts = open_prompts(folder, Dataset.open(options.dataset).item_meta())
    lock, app = threading.Lock(), FastAPI()

    @app.post("/v1/rank")
    def rank(body: dict[str, Any]) -> dict[str, Any]:
        lists = prompts.lists(UserLists(body["history"], body["candidates"]))
        encoded = prompts.encode(lists, range(len(lists.kept)))
        if isinstance(encoded, Exception):
            raise encoded
        with lock, torch.no_grad():
            [scores] = score_labels(model, prompts.encoder, [encoded])
        ranking = sorted(zip(lists.kept, scores.tolist(), strict=True), key=lambda pair: -pair[1])
        return {"ranking": [{"id": item, "score": score} for item, score in ranking]}

    uvicorn.run(app, host="127.0.0.1", port=options.serve_rival, access_log=False)


def bulk(options: argparse.Namespace, model: Path, dataset: Path, folder: Path) -> dict[str, Any]:
    """`vlrank rerank` over all test users, in a process of its own."""
    command = [sys.executable, __file__, "--model", str(model), "--dataset", str(dataset), "--run_bulk", str(folder)]
    done = subprocess.run(
        [*command, *settings_of(options)], capture_output=True, text=True, timeout=options.start_s * 4
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"prompts"')]
    if not lines:
        return {"error": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(lines[-1])
    return {
        "users": result["users"],
        "users_per_second": round(result["users"] / result["seconds"], 2),
        "seconds_with_start": round(result["seconds_with_start"], 1),
    }


def run_bulk(options: argparse.Namespace) -> None:
    """In the process of its own."""
    from vlrank.config import RerankConfig, load_config

    kept = [setting for setting in options.settings if setting.startswith(("ranking.", "as_mode="))]
    out = options.run_bulk / "bulk.parquet"
    config = load_config(RerankConfig, model=str(options.model), dataset=options.dataset, out=out, overrides=kept)
    print(json.dumps(job(config)))


def main() -> None:
    """Parse, run the parts, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="run or model folder; without weights, random ones")
    parser.add_argument("--dataset", type=Path, help="default: made-up items and users, prompts of about 2,000 tokens")
    parser.add_argument("--out", type=Path, default=Path("serve.json"))
    parser.add_argument("--users", type=int, default=512, help="different requests")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000, help="of the saturated part")
    parser.add_argument("--hostile_requests", type=int, default=10000, help="of the hostile part")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rate", type=float, default=10, help="requests per second of the steady part")
    parser.add_argument("--steady_s", type=float, default=30)
    parser.add_argument("--kill_after_s", type=float, default=5, help="when the hostile part kills a replica")
    parser.add_argument("--most_s", type=float, default=600, help="no part takes longer")
    parser.add_argument("--start_s", type=float, default=400, help="the longest start")
    parser.add_argument("--hostile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rival", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bulk", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--serve_rival", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run_bulk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="key=value of `vlrank serve`, e.g. engine.row_tokens=8192")
    options = parser.parse_intermixed_args()
    if options.serve_rival:
        serve_rival(options)
        return
    if options.run_bulk:
        run_bulk(options)
        return
    with tempfile.TemporaryDirectory(prefix="vlrank-bench-") as name:
        folder = Path(name)
        model, dataset = options.model.resolve(), options.dataset
        if dataset is None:
            dataset = folder / "data"
            make_dataset(dataset, MADE_UP, options.users, 2000)
            model = folder / "model"
            if copy_model(options.model, model):
                write_random_weights(model)
        bodies = requests_of(dataset, options.users, options.candidates)
        report: dict[str, Any] = {
            "command": "python bench/serve.py " + " ".join(sys.argv[1:]),
            "machine": machine(),
            "different_requests": len(bodies),
            "candidates": options.candidates,
        }

        def write(part: str, figures: dict[str, Any]) -> None:
            report[part] = figures
            print(json.dumps({part: figures}), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

        write("vlrank_serve", ours(options, model, dataset, bodies))
        if options.rival:
            write("transformers_loop", rival(options, model, dataset, bodies))
        if options.bulk:
            write("vlrank_rerank", bulk(options, model, dataset, folder))


if __name__ == "__main__":
    main()
