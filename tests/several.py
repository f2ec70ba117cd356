"""One process of several that train tiny models, started by `accelerate launch`; see its test."""

import dataclasses
import json
import os
import sys
from importlib import import_module
from pathlib import Path

import torch
from conftest import tiny_llama, tiny_rows
from test_evaluation import Numbers, model_that_stops, prompts

from neft_core import evaluation, ranks
from neft_core.files import save_tensors, write_json
from neft_core.masks import NeuronMask
from neft_core.methods import METHODS, moved_outside, trained_parameters
from neft_core.neurons import candidates
from neft_core.steps import Recipe
from neft_core.training import Trainer

RECIPE = Recipe(
    lr=1e-2,
    steps=9,
    batch_size=3,
    accumulation=3,
    seed=3,
    evaluate_every=2,
    checkpoint_every=3,
    max_grad_norm=0.5,
)
"""Steps of nine rows, of which an epoch's last has two."""


SHARDED = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ)


def mask_of(model) -> NeuronMask:
    """Every third up row and down column of the second layer, one down column of the first."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = {g.module: g for g in candidates(shapes, "llama", "mlp")}
    indices = {name: torch.arange(0, 24, 3) for name in groups if ".1." in name}
    first = next(name for name in groups if ".0." in name and "down" in name)
    indices[first] = torch.tensor([5])
    return NeuronMask(indices, {n: groups[n] for n in indices}, 10_000, {"base": "x"})


def fresh(dtype: str, tied: bool):
    return tiny_llama(tie_word_embeddings=tied).to(getattr(torch, dtype))


def train(
    folder: Path,
    method: str,
    dtype: str = "float64",
    tied: bool = False,
    broken: bool = False,
    dropout: float = 0.0,
    stop: int | None = None,
    precision: str = "no",
    **changes,
) -> None:
    """Train in this process, or in all that share it; the main one writes what came of it.

    Args:
        folder: its files, and checkpoints to go on from.
        method: what trains.
        dtype: of the base.
        tied: whether the head is the embedding.
        broken: let a norm train that `neft` has to leave alone.
        dropout: of LoRA.
        stop: end after so many steps, as if interrupted.
        precision: mixed precision.
        changes: of the recipe.
    """
    torch.manual_seed(5)
    model = fresh(dtype, tied)
    mask = mask_of(model) if method == "neft" else None
    options = {"rank": 2, "dropout": dropout}
    model = METHODS[method].prepare(model, options, mask, "llama")
    if broken:
        # As masks by hooks are: they never fire on a sharded parameter.
        weight = model.get_base_model().model.norm.weight.requires_grad_(True)
        weight.register_hook(
            torch.zeros_like if "ACCELERATE_USE_FSDP" in os.environ else torch.clone
        )
    trainer = Trainer(
        model,
        trained_parameters(model),
        dataclasses.replace(RECIPE, **changes),
        tiny_rows(20),
        tiny_rows(7, seed=1),
        pad=0,
        folder=folder,
        live=folder,
        label=f"{method} {dtype}",
        mixed_precision=precision,
        cpu=not SHARDED,
    )
    step = trainer._step

    def stopping(micro_batches):
        if trainer.course.step == stop:
            raise KeyboardInterrupt
        return step(micro_batches)

    trainer._step = stopping
    try:
        course = trainer.run()
    except KeyboardInterrupt:
        return
    draws = ranks.gather(torch.rand(1).item())
    whole, peak = trainer.release(), trainer.peak_bytes()
    if not ranks.main():
        return
    result = {**vars(course), "peak": peak, "draws": draws}
    origin = {"base": "x", "location": "y", "revision": ""}
    METHODS[method].save(whole, folder, origin)
    if method == "neft":
        result["compared"], result["moved"] = moved_outside(whole, fresh(dtype, tied))
        whole = whole.get_base_model()
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    save_tensors(folder / "state.safetensors", state, {})
    write_json(folder / "result.json", result)


def shard_on_cpu() -> None:
    """Accelerate shards only among accelerators; let it take gloo for the backend of one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Its operation for processes of one machine would be compiled, for minutes.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def main(folder: Path, cases: dict[str, dict]) -> None:
    torch.set_num_threads(1)
    if SHARDED:
        shard_on_cpu()
    for name, case in cases.items():
        # What follows an @ tells apart two parts of one training.
        place = folder / name.split("@")[0]
        place.mkdir(parents=True, exist_ok=True)
        train(place, **case)
    said = {count: generate(count) for count in (11, 4, 1, 0)}
    write_json(folder / f"said-{ranks.world()}.json", ranks.gather(said))
    ranks.leave()


def generate(count: int) -> list[str]:
    """Texts for some prompts, two at a time."""
    options = {"batch_size": 2, "max_new_tokens": 8, "context": 64, "label": "texts"}
    return evaluation.generate(model_that_stops(), Numbers(), prompts(count), **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
