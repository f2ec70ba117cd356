"""Trains a tiny Llama with trained neurons as one process of several; run by test_tuner_shards."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from test_methods import mask_for
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from neft_core.tuner import NeftConfig, neft_layers

WAYS = {
    "float64": ("ddp", "fsdp", "fsdp-after-use"),
    "float32": ("ddp", "fsdp", "fsdp-loaded"),
    "bfloat16": ("fsdp",),
}


def model_for(dtype: torch.dtype, form: str = "auto") -> nn.Module:
    base = tiny_llama(tie_word_embeddings=False).to(dtype)
    mask = mask_for(base, "llama")
    return get_peft_model(base, NeftConfig(mask=mask, form=form))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(model: nn.Module, rank: int, world: int, steps: int = 6) -> dict[str, torch.Tensor]:
    """AdamW on batches of 4 rows, of which each process has its share; losses and values."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        ids = torch.randint(3, 64, (4, 10), generator=generator)
        ids = ids[rank * 4 // world : (rank + 1) * 4 // world]
        logits = model(input_ids=ids).logits[:, :-1]  # the model's own loss is in fp32
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean / world)
    return {"losses": torch.stack(losses)}


def results(model: nn.Module, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inner = getattr(model, "module", model)
    state = {name: whole(tensor) for name, tensor in inner.state_dict().items()}
    return {**state, **losses}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for name, ways in WAYS.items():
        dtype = getattr(torch, name)
        for way in ways:
            model = model_for(dtype)
            if way == "ddp":
                model = nn.parallel.DistributedDataParallel(model)
            else:
                if way == "fsdp-loaded":
                    model.save_pretrained(folder / f"adapter-{rank}")
                    plain = tiny_llama(tie_word_embeddings=False).to(dtype)
                    model = PeftModel.from_pretrained(
                        plain, folder / f"adapter-{rank}", is_trainable=True
                    )
                if way == "fsdp-after-use":
                    with torch.no_grad():
                        model.get_base_model()(torch.arange(3, 13)[None])
                for layer in model.get_base_model().model.layers:
                    fully_shard(layer)
                fully_shard(model)
            found = results(model, train(model, rank, world))
            in_place = {layer.in_place for layer in neft_layers(model).values()}
            assert in_place == {way == "ddp"}, (way, in_place)
            if rank == 0:
                save_file(found, folder / f"{way}-{name}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
