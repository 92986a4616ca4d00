"""AdamW over one flat buffer of fp32 masters, with clipping, and its state as plain tensors by name.

All masters lie in one buffer and all gradients in another. An fp32 parameter is a view of the first and its gradient
one of the second, in which autograd accumulates, so an update is a handful of calls however many parameters there are:
one sum over processes, one norm, one scaling, one AdamW, one zeroing. Parameters on several devices, or of several
rates (LoRA+), have a pair each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn

from lorica.errors import LoricaError, all_faults
from lorica.geometry import rate_factor
from lorica.train.settings import TrainSettings

EPS = 1e-8
# Elements: views start at 256 bytes, as tensors of their own would, since products may depend on the alignment.
ALIGN = 64


class Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) on named parameters of any dtype.

    A parameter below fp32 is updated through an fp32 master: an update of a thousandth of a bf16 weight's size would be
    rounded away. An fp32 parameter is its own master.

    A gradient is None until the parameter first gets one; later, one that it does not get is zero.

    Args:
        processes: how many of them hold these parameters. All start with the weights of the first, and `clip` sums
            their gradients.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainSettings, processes: int = 1) -> None:
        self.parameters, self.processes = dict(parameters), processes
        self.flat: list[nn.Parameter] = []
        self.places: dict[str, tuple[int, int]] = {}  # which buffer, and where it begins there
        self.masters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.complete = False  # whether every parameter has had a gradient in some process
        groups: dict[tuple[torch.device, float], list[str]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault((parameter.device, rate_factor(name, settings.lr_ratio)), []).append(name)
        for (device, _), names in groups.items():
            self._lay_out(device, names)
        self._fill()
        rates = [{"params": [flat], "factor": factor} for flat, (_, factor) in zip(self.flat, groups, strict=True)]
        # One fused call: hundreds of small tensors cost more in calls than in arithmetic.
        self.adamw = torch.optim.AdamW(
            rates, betas=settings.betas, eps=EPS, weight_decay=settings.weight_decay, fused=True
        )

    def clear(self) -> None:
        """Forget the gradients."""
        for flat in self.flat:
            assert flat.grad is not None
            flat.grad.zero_()
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.grad = None
            elif parameter.data_ptr() != self.masters[name].data_ptr():
                self._take_back(name, parameter)

    @torch.no_grad()
    def clip(self, largest: float, scale: float = 1.0) -> Tensor:
        """Scale the gradients down to a norm of at most `largest` (0: leave them); returns the norm they had.

        `scale` is what the loss was multiplied by; it is taken out first.

        The norm stays on the device, since reading it would wait for all that was asked of it.
        """
        self._gather()
        if self.processes > 1:
            self._sum()
        gradients = [flat.grad for flat in self.flat]
        if scale != 1:
            torch._foreach_div_(gradients, scale)  # type: ignore[arg-type]
        # In two steps: one sum of millions of squares would lose half of fp32's digits.
        norms = [torch.linalg.vector_norm(gradient.view(-1, ALIGN), dim=1) for gradient in gradients]  # type: ignore[union-attr]
        norm = torch.linalg.vector_norm(torch.cat([each.to(norms[0].device) for each in norms]))
        if largest:
            factor = (largest / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))  # type: ignore[union-attr]
        return norm

    def step(self, lr: float) -> None:
        """One update at rate `lr`, B's at `settings.lr_ratio` times it, from the gradients that `clip` saw."""
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["factor"]
        self.adamw.step()
        self._fill()

    def close(self) -> None:
        """Give the parameters memory of their own again, and no gradients; of no use afterwards."""
        for parameter in self.parameters.values():
            parameter.grad = None
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.clone()
        self.parameters, self.masters, self.gradients, self.flat = {}, {}, {}, []

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and counts by ``<what>/<parameter>``, on the CPU; not copied if they are there."""
        tensors = {f"weight/{name}": master for name, master in self.masters.items()}
        for name, (place, _) in self.places.items():
            for key, value in self.adamw.state.get(self.flat[place], {}).items():
                tensors[f"{key}/{name}"] = self._part(name, value) if value.ndim else value.clone()
        return {key: tensor.detach().to("cpu") for key, tensor in tensors.items()}

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
            if f"step/{name}" in tensors:
                self._restore_moments(name, tensors)
        self._fill()

    @torch.no_grad()
    def _lay_out(self, device: torch.device, names: list[str]) -> None:
        """Make a pair of buffers and move parameters of one device and one rate in."""
        sizes = [-(-self.parameters[name].numel() // ALIGN) * ALIGN for name in names]
        flat = nn.Parameter(torch.zeros(sum(sizes), dtype=torch.float32, device=device))
        flat.grad = torch.zeros_like(flat)
        for k, name in enumerate(names):
            parameter = self.parameters[name]
            self.places[name] = len(self.flat), sum(sizes[:k])
            self.masters[name] = self._part(name, flat.data).copy_(parameter)
            self.gradients[name] = self._part(name, flat.grad)
            if parameter.dtype == torch.float32:
                parameter.data = self.masters[name]
        self.flat.append(flat)
        if self.processes > 1:
            distributed.broadcast(flat.data, 0)

    def _part(self, name: str, buffer: Tensor) -> Tensor:
        """A parameter's part of a buffer, in its shape."""
        _, start = self.places[name]
        shape = self.parameters[name].shape
        return buffer[start : start + shape.numel()].view(shape)

    @torch.no_grad()
    def _take_back(self, name: str, parameter: nn.Parameter) -> None:
        """Move a parameter in again whose tensor someone replaced."""
        if parameter.shape != self.masters[name].shape:
            raise LoricaError(
                f"{name} was {tuple(self.masters[name].shape)} and became {tuple(parameter.shape)} in training"
            )
        parameter.data = self.masters[name].copy_(parameter)

    def _gather(self) -> None:
        """Copy in what lies elsewhere: first gradients, those below fp32, and those that someone put there."""
        for name, parameter in self.parameters.items():
            gradient = self.gradients[name]
            if parameter.grad is None or parameter.grad is gradient:
                continue
            gradient.copy_(parameter.grad)
            if parameter.dtype == torch.float32:
                parameter.grad = gradient

    def _sum(self) -> None:
        """Add the gradients of all processes up. A parameter has one if it has one in any of them."""
        for flat in self.flat:
            distributed.all_reduce(flat.grad)
        if self.complete:
            return
        there = [parameter.grad is not None for parameter in self.parameters.values()]
        found = torch.tensor(there, dtype=torch.float32, device=self.flat[0].device)
        distributed.all_reduce(found)
        for (name, parameter), count in zip(self.parameters.items(), found.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = self.gradients[name].to(parameter.dtype)
        self.complete = bool(found.all())

    def _restore_moments(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        flat = self.flat[self.places[name][0]]
        state = self.adamw.state[flat]
        # All have been updated equally often but those that had no gradient at first, in older states.
        count = tensors[f"step/{name}"].to(flat.device)
        state["step"] = torch.maximum(state["step"], count) if state else count.clone()
        for key in ("exp_avg", "exp_avg_sq"):
            state.setdefault(key, torch.zeros_like(flat))
            self._part(name, state[key]).copy_(tensors[f"{key}/{name}"])

    @torch.no_grad()
    def _fill(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.masters[name])
