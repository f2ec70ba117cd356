"""Trains tiny models with trained neurons as one process of several; run by test_tuner_shards."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import tiny_llama
from families import tiny_model
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from test_methods import mask_for
from test_proof import some_neurons
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from neft_core.tuner import NeftConfig, neft_layers

WAYS = {
    "float64": ("ddp", "fsdp", "fsdp-after-use"),
    "float32": ("ddp", "fsdp", "fsdp-loaded"),
    "bfloat16": ("fsdp",),
}
OTHERS = dict.fromkeys(("gpt2", "qwen3_moe", "gpt_oss"), ("ddp", "fsdp"))
"""Conv1D with a tied head, experts of both layouts; in float64, with neurons of every kind."""


def other_base(model_type: str) -> nn.Module:
    return tiny_model(model_type, dtype=torch.float64)


def other_model(model_type: str) -> nn.Module:
    base = other_base(model_type)
    return get_peft_model(base, NeftConfig(mask=some_neurons(base, model_type, "all")))


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
    tokens = getattr(model, "module", model).config.vocab_size
    losses = []
    for _ in range(steps):
        ids = torch.randint(3, tokens, (4, 10), generator=generator)
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
        timeout=timedelta(seconds=600),
    )
    for name, ways in {**WAYS, **OTHERS}.items():
        for way in ways:
            model = other_model(name) if name in OTHERS else model_for(getattr(torch, name))
            if way == "fsdp-loaded":
                model.save_pretrained(folder / f"adapter-{rank}")
                plain = tiny_llama(tie_word_embeddings=False).to(getattr(torch, name))
                model = PeftModel.from_pretrained(
                    plain, folder / f"adapter-{rank}", is_trainable=True
                )
            if way == "fsdp-after-use":
                with torch.no_grad():
                    model.get_base_model()(torch.arange(3, 13)[None])
            if way == "ddp":
                # To send buffers it walks through the model in each step, so nothing stays packed.
                model = nn.parallel.DistributedDataParallel(
                    model, broadcast_buffers=name not in OTHERS
                )
            else:
                inner = model.get_base_model()
                for layer in inner.transformer.h if name == "gpt2" else inner.model.layers:
                    fully_shard(layer)
                fully_shard(model)
            losses = train(model, rank, world)
            layers = neft_layers(model).values()
            assert {layer.in_place for layer in layers} == {way == "ddp"}, (name, way)
            packed = any(layer.overlay.pack is not None for layer in layers)
            assert packed == (way == "ddp" and name in OTHERS), (name, way)
            found = results(model, losses)
            if rank == 0:
                save_file(found, folder / f"{way}-{name}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
