"""``vlrank serve``: deploy the reranker on Ray Serve, and, where Ray is this command's own, run until a signal comes.

On a cluster the command deploys and ends; the application stays, and the same command with another model replaces it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from vlrank.config import ServeConfig, validate
from vlrank.console import Summary, announce, console
from vlrank.data.dataset import Dataset
from vlrank.engines.models import ModelFolder
from vlrank.engines.resources import engine_actor, ranking_engine
from vlrank.errors import UserError
from vlrank.installation import install_command
from vlrank.reranking.plan import open_ranking_model, shown_items
from vlrank.runtime import cluster_address, environment, ray_session
from vlrank.serving.limits import TOKEN, needs_token
from vlrank.serving.proxy import CALLBACK
from vlrank.supervisor import allow_grace

if TYPE_CHECKING:
    from ray import serve

_END_S = 10.0
"""What the end of Ray may take after requests in work are answered."""
_LINGER_S = 1.0
"""Requests that are on their way when the last answer has been given are still told that the server ends."""


def run(config: ServeConfig) -> Summary:
    """Serve.

    Raises:
        UserError: an unusable model, dataset, setting or port, or no token where one is needed.
    """
    folder, lines = _checked(config)
    _require_serve()
    token = _token(config)
    own = cluster_address(config.ray) is None
    if own:
        _check_port(config.host, config.port)
    with environment(CALLBACK if own else {}), ray_session(config.ray):
        started = time.monotonic()
        _deploy(config, folder, token, own)
        lines["ready after"] = f"{time.monotonic() - started:,.1f} s"
        if not own:
            return Summary(f"serve: {config.model}", lines, counts={"replicas": config.replicas})
        answered = _until_a_signal(config, lines)
    return Summary(f"serve: {config.model} has ended", {"requests": answered}, counts={"requests": answered})


def dry_run(config: ServeConfig) -> Summary:
    """What a run would load, and where it would listen."""
    _, lines = _checked(config)
    _require_serve()
    _token(config)
    return Summary(f"serve (dry run): {config.model}", lines, counts={"replicas": config.replicas})


def application_of(args: dict[str, Any]) -> serve.Application:
    """What a Serve config file names as ``import_path``, with the keys of `ServeConfig` as ``args``.

    Raises:
        UserError: as `run`.
    """
    from vlrank.serving.replica import application

    config = validate(ServeConfig, args)
    return application(config, _checked(config)[0], _token(config))


def _checked(config: ServeConfig) -> tuple[ModelFolder, dict[str, object]]:
    """The model and what a summary says; mistakes are found before anything starts."""
    dataset = Dataset.open(config.dataset)
    folder, spec = open_ranking_model(config)
    shown_items(dataset, folder, spec)
    lines: dict[str, object] = {
        "model": f"{folder.path} ({spec.name})",
        "engine": ranking_engine(config.engine, folder),
        "replicas": config.replicas,
        "items": dataset.n_items,
        "users": dataset.n_users,
        "address": _address(config),
        "token": "asked for" if os.environ.get(TOKEN) else "none: anybody on this machine may ask",
    }
    return folder, lines


def _require_serve() -> None:
    try:
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Ray Serve cannot be loaded: {str(error).splitlines()[0]}",
            f"Install what it needs: {install_command('ray[serve]')}",
        ) from None


def _token(config: ServeConfig) -> str | None:
    token = os.environ.get(TOKEN) or None
    if token is None and needs_token(config.host):
        raise UserError(
            f"host {config.host} can be reached from other machines, and {TOKEN} is not set",
            f"Set {TOKEN} to a secret that clients send as `Authorization: Bearer ...`, or use host=127.0.0.1.",
        )
    return token


def _address(config: ServeConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}"


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened on: {error.strerror}", "Choose another --port or --host."
        ) from None


def _deploy(config: ServeConfig, folder: ModelFolder, token: str | None, own: bool) -> None:
    from ray import serve

    from vlrank.serving.replica import APP, DEPLOYMENT, application

    if os.environ.get("VLRANK_VERBOSE") != "1":
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    engine_actor(config.engine)  # an engine that no node can hold would be waited for without end
    serve.start(
        proxy_location="HeadOnly" if own else "EveryNode",
        http_options={"host": config.host, "port": config.port, "request_timeout_s": config.timeout_s},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        serve.run(application(config, folder, token), name=APP, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[APP].deployments
        said = deployments[DEPLOYMENT].message if DEPLOYMENT in deployments else str(error)
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        why = next((line for line in reversed(lines) if "Error" in line), str(error))
        raise UserError(
            f"the model was not deployed: {why}",
            "Mend that and run the command again; a model that was served before is served further.",
        ) from error


def _until_a_signal(config: ServeConfig, lines: dict[str, object]) -> int:
    """Returns the number of requests that were answered with a ranking."""
    import ray

    allow_grace(config.drain_s + _END_S)
    Summary(f"serve: {config.model}", lines).show()
    announce("serving at", _address(config), "bold green")
    ray_address = ray.get_runtime_context().gcs_address
    console.print(f"described at {_address(config)}/docs; Ctrl-C ends it", soft_wrap=True)
    command = f"RAY_AUTH_MODE=token vlrank serve RUN --dataset DATASET ray.address={ray_address}"
    console.print(f"another model takes over with: {command}", soft_wrap=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        announce("ending:", "accepted requests are answered, further ones refused", "yellow")
        return _drain(config.drain_s)


def _drain(seconds: float) -> int:
    from ray import serve

    from vlrank.serving.replica import APP, DEPLOYMENT

    handle: Any = serve.get_deployment_handle(DEPLOYMENT, APP)
    end = time.monotonic() + seconds

    def drain() -> tuple[int, int]:
        """Requests in work, and those answered; includes the successor of a replica that died meanwhile."""
        counts = handle.broadcast("drain").results(timeout_s=seconds)
        return sum(left for left, _ in counts), sum(answered for _, answered in counts)

    while True:
        while drain()[0] and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(_LINGER_S)
        left, answered = drain()
        if not left or time.monotonic() > end:
            break
    handle.broadcast("close").results(timeout_s=seconds)
    return answered  # Ray ends with this command, and Serve with Ray
