"""``vlrank submit`` and ``vlrank jobs``: stages as jobs of a Ray cluster, over HTTP.

A job carries its whole, checked config as a file and vlrank's own code as its working directory; the cluster needs only
the dependencies. Its id is a function of stage and config: submitting the same thing twice follows the job that runs,
and after a failure continues it, as every stage does only what is missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

from vlrank.config import Config, config_dir, read_yaml
from vlrank.console import Summary, console
from vlrank.errors import UserError
from vlrank.jobs import STAGES
from vlrank.options import stage_command
from vlrank.storage import location

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class Environment:
    """What a cluster offers to jobs, from a YAML file such as ``cluster/environments/gpu.yaml``.

    Attributes:
        python: Interpreter on every node, per stage or under ``default``: vLLM and Unsloth may need separate ones.
        env_vars: Environment variables of every process of the job.
        entrypoint_cpus: CPUs that a stage's driver holds; above 0 it runs on a worker node where the head has none.
    """

    python: Mapping[str, str] = field(default_factory=dict)
    env_vars: Mapping[str, str] = field(default_factory=dict)
    entrypoint_cpus: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Environment:
        """From a file, or the cluster's own ``python`` for every stage.

        Raises:
            UserError: unknown keys, or values of the wrong kind.
        """
        values = read_yaml(path) if path else {}
        known = {"python", "env_vars", "entrypoint_cpus"}
        if set(values) - known or not all(isinstance(value, dict) for value in values.values()):
            raise UserError(f"{path} may hold only the mappings {', '.join(sorted(known))}, found {', '.join(values)}")
        stages = {"default", *STAGES}
        for key in ("python", "entrypoint_cpus"):
            strange = set(values.get(key, {})) - stages
            if strange:
                raise UserError(f"{path}: `{key}` names unknown stages: {', '.join(sorted(strange))}")
        return cls(
            python=values.get("python", {}),
            env_vars={name: str(value) for name, value in values.get("env_vars", {}).items()},
            entrypoint_cpus=values.get("entrypoint_cpus", {}),
        )

    def interpreter(self, stage: str) -> str | None:
        """The stage's Python, None for the cluster's own."""
        return self.python.get(stage, self.python.get("default"))

    def driver_cpus(self, stage: str) -> float:
        """CPUs of the stage's driver."""
        return float(self.entrypoint_cpus.get(stage, self.entrypoint_cpus.get("default", 1)))


def submit(
    stage: str, config: Config, *, address: str, environment: Environment | None = None, workdir: str | None = None
) -> tuple[str, bool]:
    """Submit a stage, unless the same job is running or has succeeded.

    Args:
        stage: A key of `vlrank.jobs.STAGES`.
        config: The stage's config; relative paths are taken from ``workdir``.
        address: Of the cluster's dashboard, e.g. ``http://HEAD:8265``.
        environment: What the cluster offers.
        workdir: An absolute folder that all nodes see.

    Returns:
        The job's id, and whether it was submitted now.

    Raises:
        UserError: a relative path without ``workdir``, no such cluster, or a wrong token.
    """
    environment = environment or Environment()
    values = absolute_paths(config, workdir)
    job_id = job_name(stage, values)
    client = connect(address)
    with explained(address):
        known = {job.submission_id: job for job in client.list_jobs()}
        if job_id in known and known[job_id].status not in ("FAILED", "STOPPED"):
            return job_id, False
        if job_id in known:
            client.delete_job(job_id)
        interpreter = environment.interpreter(stage)
        runtime_env: dict[str, Any] = {"env_vars": dict(environment.env_vars)}
        if interpreter:
            runtime_env["py_executable"] = interpreter
        with tempfile.TemporaryDirectory(prefix="vlrank-job-") as folder:
            package(Path(folder), values)
            client.submit_job(
                entrypoint=f"{shlex.quote(interpreter or 'python')} -m vlrank.jobs {stage} --config job.yaml",
                submission_id=job_id,
                runtime_env=runtime_env | {"working_dir": folder},
                metadata={"stage": stage, "config": json.dumps(values)},
                entrypoint_num_cpus=environment.driver_cpus(stage),
            )
    return job_id, True


def job_name(stage: str, values: Mapping[str, Any]) -> str:
    """``vlrank-STAGE-HASH``: the same for the same stage and config."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"vlrank-{stage}-{digest[:12]}"


def absolute_paths(config: Config, workdir: str | None) -> dict[str, Any]:
    """The config as plain values, with every path absolute.

    A job's working directory is a temporary copy on one node: a relative path would be read from there, and its results
    thrown away with it.

    Raises:
        UserError: a relative path, and no absolute ``workdir`` to take it from.
    """
    if workdir is not None and not workdir.startswith("/"):
        raise UserError(f"--workdir {workdir!r} is not an absolute path", "Give a folder that every node sees.")

    def resolved(key: str, path: Path) -> str:
        if path.is_absolute():
            return str(path)
        if workdir is None:
            raise UserError(
                f"`{key}` is {path}, a relative path, which would lie in the job's temporary folder",
                "Give an absolute path on storage that every node sees, or --workdir FOLDER.",
            )
        return str(Path(workdir) / path)

    values = config.model_dump(mode="json", exclude_unset=True)
    for key, value in ((key, getattr(config, key)) for key in type(config).model_fields if key in values):
        if isinstance(value, Path):
            values[key] = resolved(key, value)
        elif isinstance(value, tuple) and value and all(isinstance(part, Path) for part in value):
            values[key] = [resolved(key, part) for part in value]
    return values


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
    with explained(address):
        from ray.job_submission import JobSubmissionClient

        # Ray prefers its own variable to the address it is given; here it has been asked already, after --address.
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        return JobSubmissionClient(address)


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
        if isinstance(error, ConnectionError):
            raise UserError(
                f"no Ray cluster answers at {address}",
                "Give the dashboard's address: --address http://HEAD:8265 (through a tunnel or kubectl port-forward).",
            ) from error
        raise


def follow(client: Any, job_id: str) -> Any:
    """Print the job's log as it grows until the job ends; returns Ray's ``JobDetails``."""

    async def stream() -> None:
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)

    while client.get_job_info(job_id).status not in _ENDED:
        try:
            asyncio.run(stream())
        except RuntimeError:  # the connection broke, e.g. a tunnel; the job goes on
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
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}", f"Choose one of: {', '.join(STAGES)}.")
    config_type = STAGES[stage][0]
    caught: list[Config] = []

    def catch(config: Config) -> Summary:
        caught.append(config)
        return Summary(stage)

    positional = ["dataset"] if "dataset" in config_type.model_fields else []
    command = stage_command(stage, config_type, catch, plan=catch, positional=positional)
    command.main(args=list(argv), prog_name=f"vlrank submit {stage}", standalone_mode=False)
    if not caught:
        raise SystemExit(0)  # --help
    return caught[0]


_address = click.option("--address", envvar="RAY_API_SERVER_ADDRESS", default=DEFAULT_ADDRESS, show_default=True)


@click.command("submit", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@_address
@click.option("--workdir", help="Folder that every node sees; relative paths are taken from it.")
@click.option("--env", "environment", type=click.Path(path_type=Path), help="YAML: interpreters and variables.")
@click.option("--no_wait", is_flag=True, help="Do not follow the log.")
@click.argument("stage", metavar="STAGE")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF THE STAGE]...")
def submit_command(
    address: str, workdir: str | None, environment: Path | None, no_wait: bool, stage: str, argv: tuple[str, ...]
) -> Summary:
    """Run a stage as a job of a Ray cluster: `vlrank submit train /data/shop --mode caption --out /runs/a`."""
    config = config_of(stage, argv)
    job_id, fresh = submit(stage, config, address=address, environment=Environment.read(environment), workdir=workdir)
    console.print(f"{'submitted' if fresh else 'known already:'} {job_id}")
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
    lines |= dict((details.metadata or {}).items())
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
@click.option("--env", "environment", type=click.Path(path_type=Path), help="As for `vlrank submit`.")
@click.option("--no_wait", is_flag=True, help="Do not follow the log.")
@click.argument("job_id")
def resubmit_command(address: str, environment: Path | None, no_wait: bool, job_id: str) -> Summary:
    """Submit an ended job's stage and config again; it continues where the job stopped."""
    from vlrank.config import validate

    client = connect(address)
    metadata = _details(client, address, job_id).metadata or {}
    if metadata.get("stage") not in STAGES or "config" not in metadata:
        raise UserError(f"{job_id} was not submitted by `vlrank submit`", "Submit it as it was submitted first.")
    stage = metadata["stage"]
    config = validate(STAGES[stage][0], json.loads(metadata["config"]))
    again, fresh = submit(stage, config, address=address, environment=Environment.read(environment))
    console.print(f"{'submitted' if fresh else 'still running:'} {again}")
    return Summary(f"job: {again}", {"submitted": fresh}) if no_wait else _wait(address, again)


def _details(client: Any, address: str, job_id: str) -> Any:
    with explained(address):
        known = {name: job for job in client.list_jobs() for name in (job.submission_id, job.job_id) if name}
    if job_id not in known:
        raise UserError(f"{address} knows no job {job_id}", "`vlrank jobs list` shows them.")
    return known[job_id]
