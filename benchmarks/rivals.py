"""The methods of `train_step`, each as a rival: a model, what trains in it, and its step.

`full`, `neft` and `lora` are this package's own methods. `floor` trains nothing: forward, and the
gradient of every layer's input. `masked` is how the paper's code does it: gradients of the
layout's whole projections, multiplied by a mask before AdamW updates them whole. `shira` is PEFT's.
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, memory
from benchmarks.train_step import SEED, Shape, Spec
from neft_core.groups import ROWS
from neft_core.masks import NeuronMask, NeuronScores
from neft_core.methods import METHODS, trained_parameters
from neft_core.neurons import candidates
from neft_core.selection import select_neurons

FAMILY = "llama"


def llama_config(shape: Shape, vocabulary: int) -> Any:
    """The configuration of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=vocabulary,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        use_cache=False,
    )


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama with random weights."""
    from transformers import AutoModelForCausalLM

    config = llama_config(shape, shape.vocab)
    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if shape.block:
        model.model.embed_tokens = nn.Identity()
        model.lm_head = nn.Identity()
    return model.train()


def random_mask(model: nn.Module, percent: float, layout: str, skew: float) -> NeuronMask:
    """Neurons of a layout's projections, at most `percent` of all parameters.

    Args:
        model: a Llama.
        percent: where the candidates are fewer, all of them are taken.
        skew: 0 for every neuron alike. Otherwise all neurons of a module are favoured by one
            factor, whose logarithm has this standard deviation: real masks crowd in some layers.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = {group.module: group for group in candidates(shapes, FAMILY, layout)}
    random = torch.Generator().manual_seed(SEED)
    total = sum(parameter.numel() for parameter in model.parameters())
    scores = NeuronScores(
        {
            name: torch.rand(group.count, generator=random, dtype=torch.float64)
            * (skew * torch.randn(1, generator=random, dtype=torch.float64)).exp()
            for name, group in groups.items()
        },
        groups,
        total,
    )
    most = 100 * sum(group.count * group.length for group in groups.values()) / total
    if percent >= most:
        return select_neurons(scores, share=1.0)
    return select_neurons(scores, percent=percent)


def rank_for(model: nn.Module, parameters: int) -> int:
    """The highest LoRA rank on all linear layers but the head with at most so many parameters."""
    head = getattr(model, "lm_head", None)
    sides = sum(
        module.in_features + module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    return max(1, parameters // sides)


def _floor(model: Any, _mask: NeuronMask, _rank: int) -> Any:
    return model.requires_grad_(False)


def _full(model: Any, _mask: NeuronMask, _rank: int) -> Any:
    return METHODS["full"].prepare(model, {}, None, FAMILY)


def _neft(model: Any, mask: NeuronMask, _rank: int) -> Any:
    return METHODS["neft"].prepare(model, {}, mask, FAMILY)


def _masked(model: Any, mask: NeuronMask, _rank: int) -> Any:
    """Whole projections of the layout train; each keeps what its gradient is multiplied by."""
    model.requires_grad_(False)
    for name, group in mask.groups.items():
        weight = model.get_submodule(name).weight
        chosen = mask.indices.get(name, torch.empty(0, dtype=torch.int64))
        kept = torch.zeros(weight.shape[group.axis], device=weight.device)
        kept[chosen.to(weight.device)] = 1
        weight.data = weight.data.float()
        weight.requires_grad_(True)
        weight.neuron_mask = kept[:, None] if group.axis == ROWS else kept[None, :]
    return model


def _lora(model: Any, _mask: NeuronMask, rank: int) -> Any:
    return METHODS["lora"].prepare(model, {"rank": rank}, None, FAMILY)


def _shira(model: Any, _mask: NeuronMask, rank: int) -> Any:
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(
        r=rank, random_seed=SEED, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


PREPARE: dict[str, Callable[[Any, NeuronMask, int], Any]] = {
    "floor": _floor,
    "full": _full,
    "masked": _masked,
    "neft": _neft,
    "lora": _lora,
    "shira": _shira,
}


def _adapter_bytes(method: str, model: Any) -> int:
    """Bytes of what has to be kept of a training."""
    kept: Iterable[Tensor]
    if method in ("neft", "lora", "shira"):
        from peft import get_peft_model_state_dict

        kept = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    else:
        kept = trained_parameters(model).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class Rival:
    """One method: a prepared model, its optimiser, and the same inputs as every other method."""

    def __init__(self, spec: Spec) -> None:
        # PEFT asks a transformers model by an attribute's old name; SHiRA makes sparse tensors.
        warnings.filterwarnings("ignore", module="transformers|peft")
        torch.set_num_threads(spec.threads)
        self.spec, self.device = spec, torch.device(spec.device)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        model = random_model(spec.shape, dtype, self.device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.mask = random_mask(model, spec.percent, spec.layout, spec.skew)
        rank = spec.rank or rank_for(model, self.mask.parameters)
        self.model = PREPARE[spec.method](model, self.mask, rank)
        self.trained = trained_parameters(self.model)
        self.optimizer = (
            torch.optim.AdamW(
                self.trained.values(),
                lr=1e-4,
                weight_decay=0.0,
                fused=spec.adamw == "fused" or None,
            )
            if self.trained
            else None
        )
        self.needs_autocast = dtype != torch.float32
        self._inputs(dtype)
        for _ in range(spec.warmup):
            self.step()

    def answer(self, command: str) -> Any:
        """`facts`, `memory` or `step`."""
        return {"facts": self.facts, "memory": self.memory, "step": self.timed}[command]()

    def _inputs(self, dtype: torch.dtype) -> None:
        """Tokens [B, L]; for a block, what comes into it and the gradient from above, [B, L, H]."""
        spec, random = self.spec, torch.Generator().manual_seed(SEED)
        size = (spec.batch, spec.length)
        if spec.shape.block:
            both = torch.randn(2, *size, spec.shape.hidden, generator=random).to(self.device, dtype)
            self.entering, self.above = both[0].requires_grad_(True), both[1] / both[1].numel()
        else:
            tokens = torch.randint(spec.shape.vocab, size, generator=random)
            self.tokens = tokens.to(self.device)

    def forward(self) -> Tensor:
        """The loss; for a block, what leaves it."""
        with self._autocast():
            if self.spec.shape.block:
                # Layers below have trained neurons too: every method needs this gradient.
                left: Tensor = self.model(inputs_embeds=self.entering).logits
                return left
            if self.spec.method == "floor":
                embedded = self.model.get_input_embeddings()(self.tokens).requires_grad_(True)
                entering = {"inputs_embeds": embedded}
            else:
                entering = {"input_ids": self.tokens}
            loss: Tensor = self.model(**entering, labels=self.tokens).loss
            return loss

    def backward(self, output: Tensor) -> None:
        """Gradients of what trains."""
        output.backward(self.above.to(output.dtype) if self.spec.shape.block else None)

    def update(self) -> None:
        """Clip, step, and forget the gradients."""
        if self.spec.shape.block:
            self.entering.grad = None
        if self.optimizer is None:
            return
        if self.spec.clip:
            nn.utils.clip_grad_norm_(self.trained.values(), self.spec.clip)
        for parameter in self.trained.values():
            mask = getattr(parameter, "neuron_mask", None)
            if mask is not None and parameter.grad is not None:
                parameter.grad.mul_(mask)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Forward, backward, update."""
        self.backward(self.forward())
        self.update()

    def timed(self) -> dict[str, float]:
        """Seconds of one step and of its parts; on CUDA those of the device."""
        if self.device.type == "cuda":
            return self._timed_on_cuda()
        with harness.Clock() as whole:
            with harness.Clock() as forward:
                output = self.forward()
            with harness.Clock() as backward:
                self.backward(output)
                del output
            with harness.Clock() as update:
                self.update()
        return {
            "wall": whole.wall,
            "cpu": whole.cpu,
            "forward": forward.cpu,
            "backward": backward.cpu,
            "update": update.cpu,
        }

    def _timed_on_cuda(self) -> dict[str, float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda.synchronize(self.device)
        with harness.Clock() as whole:
            marks[0].record()
            output = self.forward()
            marks[1].record()
            self.backward(output)
            del output
            marks[2].record()
            self.update()
            marks[3].record()
            torch.cuda.synchronize(self.device)
        parts = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
        return {
            "wall": whole.wall,
            "cpu": whole.cpu,
            **dict(zip(("forward", "backward", "update"), parts, strict=True)),
        }

    def memory(self) -> dict[str, int]:
        """Bytes by part; their `sum`; `peak` of a step as torch's allocator saw it; `resident`.

        The last is what the process took: on a CPU all of its memory, on CUDA what torch reserved.
        """
        for _ in range(2):
            self.step()  # whatever else has looked at the model, it trains again
        parts = memory.resident(self.model, self.optimizer)
        aside = parts.pop("aside")
        with memory.kept_for_backward(self.model) as kept:
            output = self.forward()
            parts["kept"] = kept()
        self.backward(output)
        del output
        self.update()
        parts["sum"] = sum(parts.values())
        lasting = parts["parameters"] + parts["buffers"] + parts["states"]
        parts["peak"] = lasting + memory.peak_of(self.step, self.device)
        if self.device.type == "cuda":
            parts["resident"] = torch.cuda.max_memory_reserved(self.device)
        else:
            harness.reset_peak()
            self.step()
            parts["resident"] = harness.peak_resident()
        return parts | {"aside": aside}

    def facts(self) -> dict[str, Any]:
        """Counts that don't depend on the machine."""
        with FlopCounterMode(display=False) as flops:
            self.step()
        return {
            "method": self.spec.method,
            "parameters": self.parameters,
            "trained": sum(parameter.numel() for parameter in self.trained.values()),
            "neurons": self.mask.neurons,
            "tokens": self.spec.batch * self.spec.length,
            "flops": flops.get_total_flops(),
            "adapter": _adapter_bytes(self.spec.method, self.model),
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.needs_autocast:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
