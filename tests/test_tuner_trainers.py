"""Trainers of others: HF's `Trainer`, TRL's `SFTTrainer`, Accelerate in one's own loop."""

import copy
import importlib.util

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_tuner_peft import config, out
from torch import nn
from transformers import Trainer, TrainingArguments

from neft_core.tuner import neft_layers

ROWS = torch.randint(3, 64, (12, 10), generator=torch.Generator().manual_seed(2))
QUIET = {
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
}
pytestmark = [
    pytest.mark.usefixtures("own_precision"),
    # On a CPU there is nothing to pin, and nobody to tell of the tokens' ids.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def data() -> Dataset:
    ids = ROWS.tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def model_for(seed: int = 0, **options) -> PeftModel:
    return get_peft_model(tiny_llama(seed), config(task_type="CAUSAL_LM", **options))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_for(folder, **options) -> Trainer:
    settings = {**QUIET, "max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return Trainer(model_for(), arguments, train_dataset=data(), eval_dataset=data())


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "neft_" in n}


def test_hf_trainer_resumes_with_the_same_bits(tmp_path):
    whole = trainer_for(tmp_path / "a")
    whole.train()
    want = losses(whole)
    assert len(set(want)) == 6
    saved = {path.name for path in (tmp_path / "a" / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= saved
    assert "model.safetensors" not in saved
    again = trainer_for(tmp_path / "b")
    with torch.no_grad():
        for layer in neft_layers(again.model).values():
            layer.neft_values["default"].zero_()  # what resuming has to replace
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again)[-3:] == want[-3:]
    after, expected = adapter(again.model), adapter(whole.model)
    assert after.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())
    states = (trainer.optimizer.state_dict()["state"].values() for trainer in (again, whole))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])
    assert torch.equal(out(again.model.eval()), out(whole.model.eval()))
    base = tiny_llama()
    assert torch.equal(out(whole.model.unload()), out(base.eval()))


def test_hf_trainer_takes_the_best_checkpoint_and_clips(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path, max_grad_norm=1e-3, bf16=True, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    again = PeftModel.from_pretrained(tiny_llama(), best)
    found = adapter(trainer.model)
    assert all(torch.equal(tensor, found[name]) for name, tensor in adapter(again).items())
    norms = [x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x]
    assert min(norms) > 1e-3


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_trl_trains_it_from_a_config(tmp_path, checkpointing):
    from trl import SFTConfig, SFTTrainer

    from neft_core.models import build_tokenizer

    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        gradient_checkpointing=checkpointing,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **QUIET,
    )
    tokenizer = build_tokenizer(["a b c"], 300, 64)
    trainer = SFTTrainer(
        tiny_llama(),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": ROWS.tolist()}),
        processing_class=tokenizer,
        peft_config=config(task_type="CAUSAL_LM"),
    )
    before = adapter(trainer.model)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    moved = adapter(trainer.model)
    assert all(torch.equal(moved[n], before[n]) == ("indices" in n) for n in before)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {n for n in before if "values" in n}
    trainer.save_model(str(tmp_path / "final"))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "final")
    assert torch.equal(out(again), out(trainer.model.eval()))


def plain_loop(model: nn.Module, dtype: torch.dtype | None) -> list[float]:
    """Two micro-batches of two rows a step, without Accelerate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for start in range(0, 12, 4):
        for ids in ROWS[start : start + 4].split(2):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = model(input_ids=ids, labels=ids).loss
            (loss / 2).backward()
            seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_in_a_loop_of_ones_own(precision):
    from accelerate import Accelerator

    want = model_for()
    expected = plain_loop(want, torch.bfloat16 if precision == "bf16" else None)
    assert len(set(expected)) == 6

    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = model_for()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    assert seen == expected
    got = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert all(torch.equal(t, adapter(want)[n]) for n, t in adapter(got).items())


def test_weight_decay_pulls_trained_values_to_zero_and_nothing_else():
    model = model_for()
    before = adapter(model)
    weights = copy.deepcopy(tiny_llama().state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.1)
    for layer in neft_layers(model).values():
        layer.neft_values["default"].grad = torch.zeros_like(layer.neft_values["default"])
    optimizer.step()
    out(model)
    for name, tensor in adapter(model).items():
        kept = before[name] * 0.95 if "values" in name else before[name]
        torch.testing.assert_close(tensor, kept)
    after = model.unload().state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in after.items())
