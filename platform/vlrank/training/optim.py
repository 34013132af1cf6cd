"""AdamW for bfloat16 weights with float32 master copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.adamw import adamw

_BUCKET = 2**26  # elements updated at once: bounds the float32 copies of gradients


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) on float32 copies of lower-precision weights.

    bfloat16 keeps eight bits of a number: an update of 1e-4 on a weight of 0.05 is rounded away. The copies and the
    moments are float32; the model's weights are the rounded copies. Costs 12 bytes per weight besides weight and
    gradient.

    Args:
        params: Parameters or parameter groups, as for `torch.optim.AdamW`.
        lr, betas, eps, weight_decay: As there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for bucket in _buckets(p for p in group["params"] if p.grad is not None):
                states = [self._state(parameter) for parameter in bucket]
                masters = [state["master"] for state in states]
                beta1, beta2 = group["betas"]
                adamw(
                    masters,
                    [parameter.grad.float() for parameter in bucket],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    fused=bucket[0].is_cuda,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                torch._foreach_copy_(bucket, masters)

    def _state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["master"] = parameter.detach().clone().float()
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, and the weights from its masters.

        The state stays float32; the base class would cast it to the type of the weights.
        """
        super().load_state_dict(state_dict)
        places = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, saved in state_dict["state"].items():
            for name, value in saved.items():
                self.state[places[i]][name] = value.to(places[i].device, torch.float32)
            places[i].data.copy_(self.state[places[i]]["master"])


def _buckets(parameters: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > _BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
