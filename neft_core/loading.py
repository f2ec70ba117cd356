"""A workspace's base model and tasks, as params have them loaded, placed and computed."""

import math
from pathlib import Path
from typing import Any

from neft_core import config, ranks
from neft_core.config import Params
from neft_core.errors import NeftError
from neft_core.workspace import Workspace


def base_card(ws: Workspace) -> tuple[Any, Any]:
    """The base's card and its tokenizer."""
    from neft_core import models

    card = models.Base.load(ws.path("base"))
    directory = card.directory(ws.root)
    return card, models.load_tokenizer(directory, trust_remote_code=card.trust_remote_code)


def placement(params: Params) -> dict[str, Any]:
    """Accelerate's placement: `cpu` and `mixed_precision`."""
    cpu = device(params) == "cpu"
    return {"cpu": cpu, "mixed_precision": _precision(params)}


def _precision(params: Params) -> str:
    """Autocast's type here: `no`, `bf16` or `fp16`."""
    return precision(params.compute, device(params) == "cpu")


def precision(compute: config.Compute, cpu: bool) -> str:
    """Autocast's type on a kind of device: `no`, `bf16` or `fp16`.

    Raises:
        NeftError: a CPU has no such type.
    """
    wanted = compute.mixed_precision
    if wanted == "auto":
        plain = ("auto", "float32", "float64") if cpu else ("float64",)
        wanted = "no" if compute.dtype in plain else "bf16"
    if cpu and wanted == "fp16":
        raise NeftError("params.yaml: compute.mixed_precision: got fp16; on a CPU no or bf16")
    return wanted


def frozen_type(compute: config.Compute, cpu: bool) -> str:
    """The type of frozen weights on a kind of device, as torch calls it."""
    if compute.dtype != "auto":
        return compute.dtype
    return "float32" if cpu or precision(compute, cpu) == "no" else "bfloat16"


def autocast(params: Params) -> Any:
    """The precision of training, for generation: fp32 weights may stand amid bf16 ones."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(_precision(params))
    return torch.autocast(device(params), dtype=dtype, enabled=dtype is not None)


def device(params: Params) -> str:
    """`cpu` or `cuda`; settles the number of CPU threads, so that sums repeat bit by bit.

    Where several processes share a stage, they meet here.
    """
    import torch

    torch.set_num_threads(params.compute.threads)
    wanted = params.compute.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise NeftError("params.yaml: compute.device: got cuda; this machine has no usable GPU")
    cpu = wanted == "cpu" or not torch.cuda.is_available()
    gpus = torch.cuda.device_count()
    if not cpu and ranks.local() >= gpus:
        raise NeftError(
            f"params.yaml: compute.processes: got more than the {gpus} GPUs of this machine; "
            "at most one process for each"
        )
    ranks.join(cpu)
    return "cpu" if cpu else "cuda"


def load_base(ws: Workspace) -> Any:
    """The base model, on its device."""
    params = ws.params()
    return load_as_base(ws, base_card(ws)[0], params).to(device(params))


def load_as_base(
    ws: Workspace,
    card: Any,
    params: Params,
    directory: Path | None = None,
    dtype: str | None = None,
) -> Any:
    """A model in the type of frozen weights or another: the base, or one of its architecture."""
    import torch

    from neft_core import models

    name = dtype or frozen_type(params.compute, device(params) == "cpu")
    return models.load_model(
        directory or card.directory(ws.root),
        getattr(torch, name),
        trust_remote_code=card.trust_remote_code,
    )


def optimisation(section: Any) -> dict[str, Any]:
    """The fields that every training section shares with a recipe."""
    shared = dict(section.model_dump(include=set(config.Optimisation.model_fields)))
    if shared["max_grad_norm"] is None:
        shared["max_grad_norm"] = math.inf
    return shared


def arithmetic(params: Params) -> dict[str, Any]:
    """What a training's course owes to `compute`; it may go on in other processes."""
    return params.compute.model_dump(exclude={"processes", "accelerate_config"})


def form(params: Params, task: str) -> Any:
    """A task's `format` section as tasks.py takes it.

    Raises:
        NeftError: a placeholder of the prompt is unknown, missing or broken.
    """
    from neft_core.tasks import PLAIN_TURN, Form

    section = params.tasks[task].format
    try:
        if isinstance(section, config.Translation | config.Summarisation):
            languages = (section.source_language, section.target_language)
            return Form(section.task, section.prompt, languages=languages)
        if isinstance(section, config.Nli):
            languages = (section.language, section.language)
            return Form("nli", section.prompt, languages=languages, labels=section.labels)
        return Form("instruction", PLAIN_TURN if section.prompt == "plain" else section.prompt)
    except NeftError as fault:
        raise NeftError(f"{Params.FILE}: tasks.{task}.format.{fault}") from None
