"""The deployment on Ray Serve: one replica holds one engine and answers HTTP requests itself."""

from __future__ import annotations

import itertools
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vlrank.config import ServeConfig
from vlrank.data.dataset import Dataset
from vlrank.engines.models import ModelFolder, on_this_node
from vlrank.engines.resources import engine_gpus
from vlrank.prompting.modes import mode_spec
from vlrank.reranking.pipeline import default_prompt_workers
from vlrank.reranking.ranker import PromptMaker, UserLists, open_prompts
from vlrank.serving.app import build_app
from vlrank.serving.metrics import merged
from vlrank.serving.service import open_service

APP = "vlrank"
DEPLOYMENT = "reranker"


@serve.deployment
@serve.ingress()
class Replica:
    """A replica.

    Args:
        config: The settings.
        folder: The model.
        token: See `build_app`.
    """

    def __init__(self, config: ServeConfig, folder: ModelFolder, token: str | None) -> None:
        self._token = token
        workers = _prompt_workers(config)
        makers = _PromptMakers(config, folder, workers) if workers else None
        self._service = open_service(config, folder, makers, own_process=True)
        if makers is not None:
            makers.wait()

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self._service, self._token, self._all_metrics)

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises."""
        if self._service.died is not None:
            raise self._service.died

    def drain(self) -> tuple[int, int]:
        """Take no more requests; returns the number of those in work, and of those that were answered."""
        self._service.draining = True
        return self._service.batcher.admitted, self._service.answered

    def close(self) -> None:
        """Give everything back; the last call."""
        self._service.close()

    def metrics(self) -> tuple[str, str]:
        """The replica's name and its metrics."""
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.text()

    async def _all_metrics(self) -> bytes:
        handle = serve.get_deployment_handle(DEPLOYMENT, APP)
        return merged(dict(await handle.broadcast("metrics").results_async(timeout_s=10)))

    async def __del__(self) -> None:
        if hasattr(self, "_service"):
            self.close()


def application(config: ServeConfig, folder: ModelFolder, token: str | None) -> serve.Application:
    """The application to deploy.

    An update starts new replicas before old ones end, so there is no gap; for that time it needs twice the resources.
    """
    return Replica.options(  # type: ignore[attr-defined]
        name=DEPLOYMENT,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.engine.cpus, "num_gpus": engine_gpus(config.engine)},
        # The replica refuses what its queue does not hold; Serve's own limits are behind that.
        max_ongoing_requests=2 * (config.users_at_once + config.max_queue),
        max_queued_requests=config.max_queue,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_surge_percent=100,
        max_constructor_retry_count=2,
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.drain_s,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    ).bind(config, folder, token)


class _PromptMakers:
    """Actors on the replica's node, which end with it; they start while the replica loads its model.

    Args:
        config: The settings.
        folder: The model.
        number: At least one.
    """

    def __init__(self, config: ServeConfig, folder: ModelFolder, number: int) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # They reserve no CPUs: a request must not wait for one to become free.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        maker: Any = _PromptWorker.options(**options)  # type: ignore[attr-defined]
        self._actors = [maker.remote(config, folder) for _ in range(number)]
        self._turn = itertools.cycle(self._actors)

    def wait(self) -> None:
        """Until all of them have loaded."""
        ray.get([actor.first.remote(UserLists((), ())) for actor in self._actors])

    async def __call__(self, user: UserLists) -> bytes:
        prompts: bytes = await next(self._turn).first.remote(user)
        return prompts


def _prompt_workers(config: ServeConfig) -> int:
    if config.prompt_workers is not None:
        return config.prompt_workers
    engines = config.engine.model_copy(update={"replicas": config.replicas})
    return default_prompt_workers(engines, engine_gpus(config.engine)) // config.replicas


@ray.remote
class _PromptWorker:
    """Makes first prompts in a process of its own, where they do not hold up the engine's."""

    def __init__(self, config: ServeConfig, folder: ModelFolder) -> None:
        if not mode_spec(str(folder.mode)).pixels:
            from vlrank.compat import hide_torch

            hide_torch()
        self._prompts: PromptMaker = open_prompts(on_this_node(folder), Dataset.open(config.dataset).item_meta())
        self._prompts.pictures = {}

    def first(self, user: UserLists) -> bytes:
        return self._prompts.first(user)
