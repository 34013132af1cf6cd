"""What Ray Train's processes run, where a run can start faster than by default.

On a Ray of our own (`vlrank.runtime.ray_session`) there is one node, and all processes have this environment. So no
process needs an environment of its own, and those that Ray has started ahead can serve as controller and workers; an
autoscaler's coordinator, which nothing would answer, is left out, and so is a manager of datasets where there are none.
Ahead they import this file, and nothing that imports PyTorch: only workers need that.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_SHUTDOWN_S = 30


def run_on_one_node(trainer: DataParallelTrainer, arguments: dict[str, Any]) -> Any:
    """Ray Train's ``_initialize_and_run_controller`` on a Ray of our own.

    Args:
        trainer: Being fitted.
        arguments: Of its controller.

    Returns:
        Ray Train's ``Result``.
    """
    needless: tuple[type, ...] = () if trainer.datasets else (DatasetsCallback,)
    if ray.get_runtime_context().worker.mode == ray.SCRIPT_MODE:  # Ray ends with this command, and all that it placed
        needless += (PlacementGroupCleanerCallback,)
    arguments["scaling_policy"] = _OneNode(trainer.scaling_config)
    arguments["callbacks"] = [callback for callback in arguments["callbacks"] if not isinstance(callback, needless)]
    controller = ray.remote(num_cpus=0)(_Controller).remote(**arguments)
    if threading.current_thread() is threading.main_thread():
        trainer._register_sigint_handler(controller)
    ray.get(controller.run.remote())
    return ray.get(controller.get_result.remote())


class _OneNode(FixedScalingPolicy):
    """Asks nobody for more nodes."""

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class _Group(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env


class _Controller(TrainController):
    worker_group_cls = _Group


# ---- several workers ------------------------------------------------------------------------------------------------


class ProcessGroupConfig(BackendConfig):
    """Makes the workers one process group of PyTorch, as ``TorchConfig`` does, and imports PyTorch in them alone."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What runs in the controller."""
        return _ProcessGroup

    @property
    def train_func_context(self) -> type:
        """What surrounds the training function in a worker."""
        return _OwnDevice


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        address, port = worker_group.execute_single(0, get_address_and_port)
        facts = "nccl" if gpus else "gloo", len(worker_group), address, port
        ray.get([worker_group.execute_single_async(i, _join, i, *facts) for i in range(len(worker_group))])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        leaving = worker_group.execute_async(_leave)
        ray.wait(leaving, num_returns=len(leaving), timeout=_SHUTDOWN_S)


def _join(rank: int, backend: str, world: int, address: str, port: int) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, world, "env://")


def _leave() -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=True)


class _OwnDevice:
    def __enter__(self) -> None:
        import torch
        from ray.train.torch import get_device

        if (device := get_device()).type == "cuda":
            torch.cuda.set_device(device)

    def __exit__(self, *failure: Any) -> None:
        pass
