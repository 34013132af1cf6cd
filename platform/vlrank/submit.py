"""``vlrank submit`` and ``vlrank jobs``: stages as jobs of a Ray cluster, over HTTP.

A job carries its whole, checked config as a file and vlrank's own code as its working directory; the cluster needs only
the dependencies. Its id is a function of stage and config: submitting the same thing twice follows the job that runs,
and after a failure continues it, as every stage does only what is missing. Further attempts have a number behind the
id, so that each keeps its own log.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import click
import yaml

from vlrank.config import Config, config_dir, read_yaml, validate
from vlrank.console import Summary, console
from vlrank.errors import UserError
from vlrank.options import stage_command
from vlrank.paths import WORKDIR
from vlrank.recipes.recipe import JOBS, absolute_recipe
from vlrank.runtime import CAPACITY
from vlrank.storage import location

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
AGENT_S = 30
"""How long a job waits for an agent of the cluster."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class Environment:
    """What a cluster offers to jobs, from a YAML file such as ``cluster/environments/gpu.yaml``.

    Attributes:
        python: Interpreter on every node, per stage or under ``default``, for nodes with several environments.
        env_vars: Environment variables of every process of the job.
        entrypoint_cpus: CPUs that a stage's driver holds; above 0 it runs on a worker node where the head has none.
        capacity: What an autoscaling cluster can grow to, e.g. ``{"GPU": 8}``, see `vlrank.runtime.cluster_resources`.
    """

    python: Mapping[str, str] = field(default_factory=dict)
    env_vars: Mapping[str, str] = field(default_factory=dict)
    entrypoint_cpus: Mapping[str, float] = field(default_factory=dict)
    capacity: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Environment:
        """From a file, or the cluster's own ``python`` for every stage.

        Raises:
            UserError: unknown keys, or values of the wrong kind.
        """
        values = read_yaml(path) if path else {}
        known = {each.name for each in fields(cls)}
        if set(values) - known or not all(isinstance(value, dict) for value in values.values()):
            raise UserError(f"{path} may hold only the mappings {', '.join(sorted(known))}, found {', '.join(values)}")
        stages = {"default", *JOBS}
        for key in ("python", "entrypoint_cpus"):
            strange = set(values.get(key, {})) - stages
            if strange:
                raise UserError(f"{path}: `{key}` names unknown stages: {', '.join(sorted(strange))}")
        for key in ("entrypoint_cpus", "capacity"):
            for name, value in values.get(key, {}).items():
                if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                    raise UserError(f"{path}: `{key}` of {name} is {value!r}, expected a number")
        return cls(**values | {"env_vars": {name: str(value) for name, value in values.get("env_vars", {}).items()}})

    def interpreter(self, stage: str) -> str | None:
        """The stage's Python, None for the cluster's own."""
        return self.python.get(stage, self.python.get("default"))

    def driver_cpus(self, stage: str) -> float:
        """CPUs of the stage's driver."""
        return float(self.entrypoint_cpus.get(stage, self.entrypoint_cpus.get("default", 1)))


def submit(
    stage: str,
    config: Config,
    *,
    address: str,
    environment: Environment | None = None,
    workdir: str | None = None,
    again: bool = False,
) -> tuple[str, bool]:
    """Submit a stage, unless the same job is running or has succeeded.

    Args:
        stage: A key of `vlrank.recipes.recipe.JOBS`.
        config: The stage's config; relative paths are taken from ``workdir``.
        address: Of the cluster's dashboard, e.g. ``http://HEAD:8265``.
        environment: What the cluster offers.
        workdir: An absolute folder that all nodes see; the job's relative paths are taken from it.
        again: Run a job that has succeeded once more; it does what is missing by now.

    Returns:
        The job's id, and whether it was submitted now.

    Raises:
        UserError: a relative path without ``workdir``, no such cluster, or a wrong token.
    """
    environment = environment or Environment()
    values = absolute_recipe(config, workdir)
    client = connect(address)
    with explained(address):
        job_id = job_name(stage, values)
        if before := attempts(client, job_id):
            number, last = before[-1]
            # What a server's job has deployed may have been replaced by another model since.
            if last.status not in (_ENDED if again or stage == "serve" else ("FAILED", "STOPPED")):
                return str(last.submission_id), False
            job_id = f"{job_id}-{number + 1}"
        interpreter = environment.interpreter(stage)
        file = "job.yaml" if config.file_argument else "--config job.yaml"
        env_vars = dict(environment.env_vars)
        if workdir:
            env_vars[WORKDIR] = workdir
        if environment.capacity:
            env_vars[CAPACITY] = json.dumps(dict(environment.capacity))
        runtime_env: dict[str, Any] = {"env_vars": env_vars}
        if interpreter:
            runtime_env["py_executable"] = interpreter
        with tempfile.TemporaryDirectory(prefix="vlrank-job-") as folder:
            package(Path(folder), values)
            _when_an_agent_is_up(
                client.submit_job,
                entrypoint=f"{shlex.quote(interpreter or 'python')} -m vlrank.jobs {stage} {file}",
                submission_id=job_id,
                runtime_env=runtime_env | {"working_dir": folder},
                metadata={
                    "stage": stage,
                    "config": json.dumps(values),
                    "workdir": workdir or "",
                    "environment": json.dumps(asdict(environment)),
                },
                entrypoint_num_cpus=environment.driver_cpus(stage),
            )
    return job_id, True


def job_name(stage: str, values: Mapping[str, Any]) -> str:
    """``vlrank-STAGE-HASH``: the same for the same stage and config."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"vlrank-{stage}-{digest[:12]}"


def attempts(client: Any, name: str) -> list[tuple[int, Any]]:
    """(1, 2, ..., Ray's ``JobDetails``) of the jobs NAME, NAME-2, ..., in this order."""
    names = ((re.fullmatch(rf"{name}(?:-(\d+))?", job.submission_id or ""), job) for job in client.list_jobs())
    return sorted(((int(found[1] or 1), job) for found, job in names if found), key=lambda attempt: attempt[0])


def package(folder: Path, values: Mapping[str, Any]) -> None:
    """What a job's working directory holds: the package, its configs, and ``job.yaml``."""
    source = Path(__file__).parent
    shutil.copytree(source, folder / "vlrank", ignore=shutil.ignore_patterns("__pycache__", "_configs"))
    shutil.copytree(config_dir(), folder / "vlrank" / "_configs")
    (folder / "job.yaml").write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")


def connect(address: str) -> Any:
    """A `ray.job_submission.JobSubmissionClient`; the token is Ray's own setting (``RAY_AUTH_TOKEN`` or a file).

    Raises:
        UserError: nothing answers there, or the token is wrong.
    """
    host = urlsplit(address).hostname or ""
    if host == "localhost" or host.startswith("127.") or host == "::1":
        # A proxy cannot reach this machine's own address.
        past = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host]
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, past))
    with explained(address):
        from ray.job_submission import JobSubmissionClient

        # Ray prefers its own variable to the given address; --address and the variable were resolved above.
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        return JobSubmissionClient(address)


_NO_AGENT = "No available agent"


def _when_an_agent_is_up(submit_job: Callable[..., str], **job: Any) -> None:
    """Submit, and try again for half a minute: a head that has just started has no agent yet."""
    from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_fixed

    missing = retry_if_exception_message(match=f"(?s).*{_NO_AGENT}")
    Retrying(retry=missing, stop=stop_after_delay(AGENT_S), wait=wait_fixed(1), reraise=True)(submit_job, **job)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Ray's HTTP errors as messages that say what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(error).__name__ in ("AuthenticationError", "RayAuthenticationError"):
            raise UserError(
                f"the cluster at {address} refused the token",
                "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put the cluster's token into ~/.ray/auth_token.",
            ) from error
        if _NO_AGENT in str(error):
            raise UserError(
                f"the cluster at {address} has no agent that takes jobs",
                "If another Ray on that host holds the agent's port, start this one with another: "
                "ray start --head --dashboard-agent-listen-port=PORT.",
            ) from error
        by_requests = type(error).__module__.startswith("requests")
        if isinstance(error, ConnectionError) or by_requests or str(error).startswith("Request failed"):
            reason = "" if isinstance(error, ConnectionError) else f": {' '.join(str(error).split())[:300]}"
            raise UserError(
                f"no Ray cluster answers at {address}{_by_proxy(address)}{reason}",
                "Give the dashboard's address: --address http://HEAD:8265 (through a tunnel or kubectl port-forward).",
            ) from error
        raise


def _by_proxy(address: str) -> str:
    """Names the variable that sends requests to an address through a proxy."""
    parts = urlsplit(address)
    if parts.scheme not in getproxies() or proxy_bypass(parts.hostname or ""):
        return ""
    return f" through the proxy of {parts.scheme}_proxy (no_proxy={parts.hostname} goes past it)"


def follow(client: Any, job_id: str) -> Any:
    """Print the job's log as it grows until the job ends; returns Ray's ``JobDetails``."""
    import aiohttp

    printed = 0

    async def stream() -> None:
        nonlocal printed
        at = 0  # every connection tells the log from its beginning
        async for text in client.tail_job_logs(job_id):
            print(text[max(0, printed - at) :], end="", flush=True)
            at += len(text)
            printed = max(printed, at)

    while client.get_job_info(job_id).status not in _ENDED:
        try:
            asyncio.run(stream())
        except (RuntimeError, aiohttp.ClientError):  # the connection broke, e.g. a tunnel; the job goes on
            time.sleep(2)
    return client.get_job_info(job_id)


def outcome(client: Any, job_id: str) -> dict[str, Any] | None:
    """The JSON last line of an ended job; None if it printed none, or its log went away with its node."""
    try:
        log = client.get_job_logs(job_id)
    except RuntimeError:
        return None
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "status" in found:
                return found
    return None


def config_of(stage: str, argv: Sequence[str]) -> Config:
    """The stage's config from the words that ``vlrank STAGE`` would take.

    Raises:
        UserError: unknown stage, or a wrong config: nothing is uploaded.
    """
    if stage.startswith("-"):
        raise UserError(f"{stage} is no option of `vlrank submit`", "Options of a stage stand behind its name.")
    if stage not in JOBS:
        raise UserError(f"unknown stage {stage!r}", f"Choose one of: {', '.join(JOBS)}.")
    config_type = JOBS[stage][0]
    caught: list[Config] = []

    def catch(config: Config) -> Summary:
        caught.append(config)
        return Summary(stage)

    command = stage_command(stage, config_type, catch, dry_run=catch)
    command.main(args=list(argv), prog_name=f"vlrank submit {stage}", standalone_mode=False)
    if not caught:
        raise SystemExit(0)  # --help
    return caught[0]


_address = click.option("--address", envvar="RAY_API_SERVER_ADDRESS", default=DEFAULT_ADDRESS, show_default=True)


@click.command("submit", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@_address
@click.option("--workdir", help="Folder that every node sees; relative paths start there.")
@click.option("--env", "environment", type=click.Path(path_type=Path), help="YAML: interpreters and variables.")
@click.option("--no_wait", is_flag=True, help="Do not follow the log.")
@click.argument("stage", metavar="STAGE")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF THE STAGE]...")
def submit_command(
    address: str, workdir: str | None, environment: Path | None, no_wait: bool, stage: str, argv: tuple[str, ...]
) -> Summary:
    """Run a stage as a job of a Ray cluster.

    Example: `vlrank submit train /data/shop --mode caption --out /runs/a`.
    """
    if stage in ("-h", "--help"):  # of this command; behind a stage's name it is the stage's own
        print(click.get_current_context().get_help())
        raise SystemExit(0)
    config, offered = config_of(stage, argv), Environment.read(environment)
    if "--dry_run" in argv:
        values = absolute_recipe(config, workdir)
        facts = {"job": job_name(stage, values), "python": offered.interpreter(stage) or "the cluster's own"}
        return Summary(f"submit: {stage} (dry run: the cluster was not asked)", facts | values)
    job_id, fresh = submit(stage, config, address=address, environment=offered, workdir=workdir)
    console.print(f"submitted {job_id}" if fresh else f"known already: {job_id}")
    if no_wait:
        return Summary(f"submit: {stage}", {"job": job_id, "next": f"vlrank jobs logs {job_id}"})
    return _wait(address, job_id)


def _wait(address: str, job_id: str) -> Summary:
    client = connect(address)
    try:
        with explained(address):
            details = follow(client, job_id)
            last = outcome(client, job_id)
    except KeyboardInterrupt:
        console.print(f"the job goes on; `vlrank jobs logs {job_id}` follows it, `vlrank jobs stop {job_id}` ends it")
        raise
    if details.status != "SUCCEEDED":
        reason = (last or {}).get("message") or details.message
        raise UserError(
            f"{job_id} {str(details.status).lower()}: {reason}", f"`vlrank jobs resubmit {job_id}` continues it."
        )
    facts = last or {}
    output = facts.get("output")
    return Summary(job_id, {"status": "succeeded"}, location(output) if output else None, facts.get("counts", {}))


@click.group("jobs")
def jobs_command() -> None:
    """List, show, follow, stop and resubmit jobs of a Ray cluster."""


@jobs_command.command("list")
@_address
def list_command(address: str) -> Summary:
    """All jobs, the newest first."""
    from rich.table import Table

    client = connect(address)
    with explained(address):
        jobs = sorted(client.list_jobs(), key=lambda job: -(job.start_time or 0))
    table = Table("job", "status", "started", "minutes", title=address)
    for job in jobs:
        begun = (job.start_time or 0) / 1000
        ended = (job.end_time or time.time() * 1000) / 1000
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(begun)) if begun else ""
        minutes = f"{(ended - begun) / 60:.1f}" if begun else ""
        table.add_row(job.submission_id or job.job_id, str(job.status), started, minutes)
    console.print(table)
    return Summary(f"jobs: {address}", {"jobs": len(jobs)}, counts={"jobs": len(jobs)})


@jobs_command.command("show")
@_address
@click.argument("job_id")
def show_command(address: str, job_id: str) -> Summary:
    """Status, config and outcome of a job."""
    client = connect(address)
    details = _details(client, address, job_id)
    last = outcome(client, job_id) or {}
    lines: dict[str, object] = {"status": str(details.status), "message": last.get("message") or details.message}
    metadata = details.metadata or {}
    lines |= {key: metadata[key] for key in ("stage", "workdir", "config") if metadata.get(key)}
    output = last.get("output")
    return Summary(f"job: {job_id}", lines, location(output) if output else None, last.get("counts", {}))


@jobs_command.command("logs")
@_address
@click.argument("job_id")
def logs_command(address: str, job_id: str) -> Summary:
    """The log of a job, followed until it ends."""
    client = connect(address)
    if _details(client, address, job_id).status in _ENDED:
        print(client.get_job_logs(job_id), end="")
        return Summary(f"job: {job_id}", {"status": str(client.get_job_info(job_id).status)})
    return _wait(address, job_id)


@jobs_command.command("stop")
@_address
@click.argument("job_id")
def stop_command(address: str, job_id: str) -> Summary:
    """End a job; what it committed stays."""
    client = connect(address)
    _details(client, address, job_id)
    with explained(address):
        stopped = client.stop_job(job_id)
    return Summary(f"job: {job_id}", {"stopped": stopped, "continue": f"vlrank jobs resubmit {job_id}"})


@jobs_command.command("resubmit")
@_address
@click.option("--env", "environment", type=click.Path(path_type=Path), help="Default: as it was submitted.")
@click.option("--no_wait", is_flag=True, help="Do not follow the log.")
@click.argument("job_id")
def resubmit_command(address: str, environment: Path | None, no_wait: bool, job_id: str) -> Summary:
    """Submit an ended job's stage and config again; it continues where the job stopped, or does what is missing now."""
    client = connect(address)
    metadata = _details(client, address, job_id).metadata or {}
    if metadata.get("stage") not in JOBS or not {"config", "workdir", "environment"} <= metadata.keys():
        raise UserError(f"{job_id} was not submitted by `vlrank submit`", "Submit it as it was submitted first.")
    stage = metadata["stage"]
    config = validate(JOBS[stage][0], json.loads(metadata["config"]))
    offered = Environment.read(environment) if environment else Environment(**json.loads(metadata["environment"]))
    workdir = metadata["workdir"] or None
    job_id, fresh = submit(stage, config, address=address, environment=offered, workdir=workdir, again=True)
    console.print(f"submitted {job_id}" if fresh else f"still running: {job_id}")
    return Summary(f"job: {job_id}", {"submitted": fresh}) if no_wait else _wait(address, job_id)


def _details(client: Any, address: str, job_id: str) -> Any:
    with explained(address):
        known = {name: job for job in client.list_jobs() for name in (job.submission_id, job.job_id) if name}
    if job_id not in known:
        raise UserError(f"{address} knows no job {job_id}", "`vlrank jobs list` shows them.")
    return known[job_id]
