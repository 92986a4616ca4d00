"""One training in several processes, as `torchrun` or `accelerate launch` starts them.

Every process holds the trained parameters whole, works on its part of an update's examples and adds its gradient to
those of the others (`optimizer`). It holds the frozen base whole too, or, where accelerate is asked for FSDP2, a part
of it: the weights of a layer are brought together while it is used. Nothing that is sharded is trained, so the base
keeps its dtype, an adapter and a state are written as by one process, and any number of them can continue a run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import nn

from lorica import patch
from lorica.errors import LoricaError
from lorica.models.machine import resolve_device
from lorica.train import folder


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Meet the other processes, where there are any, for the length of a block in which models are loaded and trained.

    Each has a GPU of its own then, which `device`, the word of the settings, must leave open.
    """
    if not several():
        yield
        return
    if ":" in device:
        raise LoricaError(f"each process takes a device of its own: give {device.split(':')[0]}, not {device}")
    # transformers would leave the weights of all processes but one empty, to be filled from that one later.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    state = PartialState(cpu=resolve_device(device).type == "cpu")
    yield
    state.destroy_process_group()


def several() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def accelerator_for(model: nn.Module) -> Accelerator:
    """What knows of the other processes; LoricaError for what this model or lorica cannot do with them."""
    devices = {parameter.device for parameter in model.parameters()}
    on_cpu = {device.type for device in devices} == {"cpu"}
    made = Accelerator(cpu=several() and on_cpu, mixed_precision="no", device_placement=False)
    if several() and made.num_processes == 1:
        raise LoricaError(
            "this process does not find the others that it was started with: put the model on a GPU or CPU"
        )
    if several() and len(devices) > 1:
        raise LoricaError("a model that is spread over devices is trained by one process; start it as a single one")
    if made.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise LoricaError(f"{made.distributed_type.value} is not supported: use torchrun, or accelerate with FSDP2")
    return made


def agreed_folder(accelerator: Accelerator, out: str | Path | None, name: str) -> Path:
    """A new run folder, made by the first process; all raise LoricaError where it cannot be made."""
    made: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            made = [folder.new(out, name)]
        except LoricaError as fault:
            made = [fault]
    (found,) = broadcast_object_list(made)
    if isinstance(found, LoricaError):
        raise found
    return found


def agreed(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Each flag that is set in any process, so that all of them do the same after the same update."""
    if accelerator.num_processes == 1:
        return list(flags)
    found = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device), "sum")
    return [bool(flag) for flag in found.tolist()]


def alike(accelerator: Accelerator, **prints: str) -> None:
    """LoricaError unless every process has the same fingerprints, of what is named by their keys."""
    if accelerator.num_processes == 1:
        return
    said = gather_object([prints])
    if faults := [name for name in prints if len({each[name] for each in said}) > 1]:
        raise LoricaError(f"the processes differ in {' and '.join(faults)}: each must read the same files")


def sharding() -> bool:
    """Whether accelerate was asked for FSDP."""
    return several() and parse_flag_from_env("ACCELERATE_USE_FSDP")


def shard(model: Any, accelerator: Accelerator) -> None:
    """Leave this process its part of every frozen weight; what the active adapter trains stays whole.

    The units that are brought together are the layers that accelerate was told of, or those that the model says should
    not be split, and what lies outside of them. accelerate's own preparation is not used: under mixed precision it
    turns weights into fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise LoricaError("lorica shards with FSDP2 only: accelerate launch --fsdp_version 2")
    if packing := patch.packing(model):
        raise LoricaError(f"FSDP cannot shard weights in {packing}: leave --quantize away, or do without FSDP")
    units = set(plugin.transformer_cls_names_to_wrap or model._no_split_modules or ())
    how = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "ignored_params": set(patch.trainable(model).values()),
        "offload_policy": plugin.cpu_offload,
    }
    layers = [module for module in model.modules() if type(module).__name__ in units]
    for layer in reversed(layers):
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **how)
    fully_shard(model, **how)
