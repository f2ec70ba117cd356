"""Ways to share a training among processes: what is refused, and what DeepSpeed has to be told.

DeepSpeed clips and steps by itself, casts whole models, and keeps its states in flat parts.
"""

import math
import os
from collections.abc import Iterable
from typing import Any

import torch

from neft_core import ranks
from neft_core.errors import NeftError
from neft_core.steps import Recipe

CONFIG = "params.yaml: compute.accelerate_config"


def deepspeed(cpu: bool) -> bool:
    """Whether Accelerate will share by DeepSpeed; on a CPU it never does."""
    return not cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check(
    accelerator: Any, recipe: Recipe, label: str, trained: Iterable[torch.Tensor], precision: str
) -> None:
    """Refuse ways to share a training that its loop can't take; prepare for DeepSpeed's.

    Args:
        accelerator: of the training.
        recipe: its course.
        label: for messages.
        trained: what trains.
        precision: `no`, `bf16` or `fp16`.

    Raises:
        NeftError: it is refused.
    """
    kind = accelerator.distributed_type
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise NeftError(f"{CONFIG}: its fsdp_version is 1; set fsdp_version: 2")
    if kind != "DEEPSPEED":
        return
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage == 3:
        raise NeftError(f"{CONFIG}: its zero_stage is 3; at most 2, or FSDP2")
    if precision == "fp16":
        raise NeftError(
            "params.yaml: compute.mixed_precision: got fp16; under DeepSpeed no or bf16"
        )
    if any(tensor.dtype != torch.float32 for tensor in trained):
        raise NeftError(
            "params.yaml: compute.dtype: got float64; what trains under DeepSpeed is float32"
        )
    # It clips and steps in the backward pass of a step's last micro-batch. The sizes are those of
    # this training: what an earlier one of this process left would have to be the same.
    norm = recipe.max_grad_norm if math.isfinite(recipe.max_grad_norm) else 0.0
    plugin.deepspeed_config |= {
        "gradient_clipping": norm,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": recipe.batch_size,
        "train_batch_size": recipe.batch_size * accelerator.num_processes,
    }
    if ranks.main():
        print(f"{label}: under DeepSpeed an interrupted training starts anew")


def autocast(model: Any, device: torch.device, precision: str) -> None:
    """Mixed precision inside a model's forward pass: DeepSpeed's own casts what trains as well."""
    if precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)


def bare(model: Any) -> None:
    """Undo `autocast`."""
    model.__dict__.pop("forward", None)
