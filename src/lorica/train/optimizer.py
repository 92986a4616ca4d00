"""AdamW over fp32 masters, with clipping, and its state as plain tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorica.errors import all_faults
from lorica.train.settings import TrainSettings

EPS = 1e-8


class Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on named parameters of any dtype.

    A parameter below fp32 is updated through an fp32 master: an update of a thousandth of a bf16 weight's size would be
    rounded away. An fp32 parameter is its own master.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
        self.parameters = dict(parameters)
        self.masters = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.parameters.items()
        }
        # One fused call: hundreds of small tensors cost more in calls than in arithmetic.
        self.adamw = torch.optim.AdamW(
            self.masters.values(), betas=settings.betas, eps=EPS, weight_decay=settings.weight_decay, fused=True
        )

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in [*self.parameters.values(), *self.masters.values()]:
            parameter.grad = None

    def clip(self, largest: float) -> float:
        """Scale the gradients down to a norm of at most `largest` (0: leave them); returns the norm they had."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
        return float(nn.utils.clip_grad_norm_(self.masters.values(), largest or float("inf")))

    def step(self, lr: float) -> None:
        """One update at rate `lr`, from the gradients that `clip` saw."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self._fill()

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and counts by ``<what>/<parameter>``, on the CPU."""
        tensors = {f"weight/{name}": master for name, master in self.masters.items()}
        for name, master in self.masters.items():
            tensors |= {f"{key}/{name}": value for key, value in self.adamw.state.get(master, {}).items()}
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state`. LoricaError, all faults at once, if it is of other parameters."""
        saved = {key.partition("/")[2]: tensor.shape for key, tensor in tensors.items() if key.startswith("weight/")}
        faults = [f"missing  {name}" for name in self.masters if name not in saved]
        faults += [f"extra    {name}" for name in saved if name not in self.masters]
        faults += [
            f"shape    {name}: saved {tuple(saved[name])}, model {tuple(master.shape)}"
            for name, master in self.masters.items()
            if name in saved and saved[name] != master.shape
        ]
        if faults:
            raise all_faults("the saved state is of another adapter:", faults)
        for name, master in self.masters.items():
            master.copy_(tensors[f"weight/{name}"])
            # A parameter that had no gradient yet has none.
            if f"step/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.adamw.state[master] = {key: value.to(master.device) for key, value in moments.items()}
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
