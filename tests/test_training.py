"""The loop against a plain torch loop; its invariants: accumulation, resume, determinism."""

import csv
import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tiny_rows

from neft_core.errors import NeftError
from neft_core.methods import METHODS, trained_parameters
from neft_core.steps import (
    Recipe,
    collate,
    collate_share,
    deal,
    learning_rate,
    plan_steps,
    split_loss,
    trained_tokens,
)
from neft_core.training import Trainer

RECIPE = Recipe(lr=1e-2, steps=12, batch_size=4, seed=3, evaluate_every=4, checkpoint_every=3)


def train(folder, recipe=RECIPE, rows=None, dev=True, model=None):
    model = METHODS["full"].prepare(model or tiny_llama(), {}, None, "llama")
    trainer = Trainer(
        model,
        trained_parameters(model),
        recipe,
        rows or tiny_rows(20),
        tiny_rows(7, seed=1) if dev else None,
        pad=0,
        folder=folder,
        live=folder / "live",
        label="t",
    )
    course = trainer.run()
    return trainer, course


def weights(trainer):
    return {k: v.detach().clone() for k, v in trainer.raw_model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_equals_a_plain_torch_loop(tmp_path):
    rows = tiny_rows(20)
    trainer, course = train(tmp_path, rows=rows, dev=False)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE.lr, weight_decay=0.0)
    losses = []
    plan = plan_steps(np.diff(rows["offsets"]), RECIPE)
    for step, (micro,) in enumerate(itertools.islice(plan, RECIPE.steps)):
        total, count = 0.0, 0
        for row in micro:  # one row at a time: no padding, no masks
            part = slice(rows["offsets"][row], rows["offsets"][row + 1])
            ids = torch.from_numpy(rows["tokens"][part].astype(np.int64))
            logits = model(ids[None]).logits[0, :-1].log_softmax(-1)
            wanted = torch.from_numpy(rows["trained"][part][1:] > 0)
            total = total - logits[torch.arange(len(ids) - 1), ids[1:]][wanted].sum()
            count += int(wanted.sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RECIPE.lr * (1 - step / RECIPE.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
    np.testing.assert_allclose([row[2] for row in course.train], losses, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights(trainer)[name], parameter, rtol=1e-3, atol=1e-4)


def test_micro_batches_1x8_equal_2x4_and_8x1(tmp_path):
    courses = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        recipe = dataclasses.replace(RECIPE, batch_size=size, accumulation=accumulation)
        courses.append(train(tmp_path / str(size), recipe)[1])
    for other in courses[1:]:
        assert [r[0] for r in other.train] == [r[0] for r in courses[0].train]
        for mine, theirs in zip(courses[0].train, other.train, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-4)


def test_steps_use_each_row_once_an_epoch():
    rows = tiny_rows(21)
    recipe = dataclasses.replace(RECIPE, batch_size=2, accumulation=2)
    steps = list(itertools.islice(plan_steps(np.diff(rows["offsets"]), recipe), 6))
    assert sorted(np.concatenate([np.concatenate(s) for s in steps])) == list(range(21))
    again = list(itertools.islice(plan_steps(np.diff(rows["offsets"]), recipe), 6))
    assert [[m.tolist() for m in s] for s in steps] == [[m.tolist() for m in s] for s in again]


@pytest.mark.parametrize("rows", [1, 2, 7, 12])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_the_rows_of_a_step_in_as_many_micro_batches(rows, processes):
    order = np.random.default_rng(rows).permutation(20)[:rows]
    step = [order[i : i + 3] for i in range(0, rows, 3)]
    shares = [deal(step, rank, processes) for rank in range(processes)]
    dealt = np.concatenate([np.concatenate(share) for share in shares])
    assert sorted(dealt.tolist()) == sorted(order.tolist())
    assert {len(share) for share in shares} == {max(1, -(-rows // (3 * processes)))}
    sizes = [len(micro) for share in shares for micro in share]
    assert max(sizes) <= 3
    if processes == 1:
        assert [m.tolist() for m in shares[0]] == [m.tolist() for m in step]


def test_an_empty_share_has_a_forward_pass_and_no_loss():
    arrays, rows = tiny_rows(5), np.array([3, 1])
    batch = collate_share(arrays, rows[:0], rows, 0)
    assert torch.equal(batch["input_ids"], collate(arrays, [1], 0)["input_ids"])
    assert (batch["labels"] == -100).all()
    whole = collate(arrays, rows, 0)
    assert trained_tokens(arrays, rows) == int((whole["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("processes", [2, 3])
def test_the_shares_of_a_dev_loss_add_up(batch_size, processes):
    model, dev = tiny_llama(), tiny_rows(7)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    whole = split_loss(model, dev, batch_size, 0, "cpu")
    shares, passes = [], set()
    for rank in range(processes):
        calls.clear()
        shares.append(split_loss(model, dev, batch_size, 0, "cpu", rank, processes))
        passes.add(len(calls))
    assert [sum(part) for part in zip(*shares, strict=True)] == pytest.approx(whole)
    assert len(passes) == 1, "sharded models hang where processes differ in forward passes"


@pytest.mark.parametrize("stop", [1, 3, 5, 8, 11])
def test_resumed_training_is_bit_identical(tmp_path, monkeypatch, stop):
    whole, course = train(tmp_path / "whole")
    original = Trainer._step

    def dies(self, micro):
        if self.course.step == stop:
            raise KeyboardInterrupt
        return original(self, micro)

    monkeypatch.setattr(Trainer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    monkeypatch.undo()
    torch.rand(5)  # another state of the generator than the first process had
    resumed, second = train(tmp_path / "cut")
    assert same(weights(whole), weights(resumed))
    assert (second.train, second.dev, second.best_step) == (
        course.train,
        course.dev,
        course.best_step,
    )
    assert second.tokens == course.tokens
    with (tmp_path / "cut" / "live" / "train.csv").open() as handle:
        assert [int(r["step"]) for r in csv.DictReader(handle)] == list(range(1, 13))


@pytest.mark.parametrize("harm", ["cut", "turned", "gone"])
@pytest.mark.parametrize("name", ["checkpoint-*/state", "best-*"])
def test_damaged_checkpoint_is_told_and_left_out(tmp_path, capsys, name, harm):
    whole, _ = train(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (state,) = (tmp_path / "b").glob(f"{name}.safetensors")
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 0x40
    if harm == "gone":
        state.unlink()
    else:
        state.write_bytes(content if harm == "turned" else content[:100])
    again, _ = train(tmp_path / "b")
    assert "checkpoint-12 is damaged; left out" in capsys.readouterr().out
    assert same(weights(whole), weights(again))


def test_ends_with_the_best_checkpoint(tmp_path):
    recipe = dataclasses.replace(RECIPE, lr=0.05, evaluate_every=1, batch_size=2)
    trainer, course = train(tmp_path, recipe, tiny_rows(2))
    losses = [row[2] for row in course.dev]
    assert course.best_step == 1 + int(np.argmin(losses)) < recipe.steps
    total, tokens = split_loss(trainer.raw_model, tiny_rows(7, seed=1), 8, 0, "cpu")
    assert total / tokens == pytest.approx(min(losses), abs=1e-6)


def test_patience_stops_early(tmp_path):
    recipe = dataclasses.replace(RECIPE, lr=0.5, evaluate_every=1, patience=2)
    _, course = train(tmp_path, recipe)
    assert course.stopped_early
    assert course.step == course.best_step + 2 < recipe.steps


def test_non_finite_loss_names_the_step(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NeftError, match="t: loss is nan at step 1; lower the learning rate"):
        train(tmp_path, model=model)


def test_learning_rate_rises_then_falls_to_zero():
    recipe = dataclasses.replace(RECIPE, lr=1.0, steps=10, lr_warmup=2)
    rates = [learning_rate(recipe, step) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == 0
    assert np.all(np.diff(rates[2:]) < 0)


def test_collate_pads_right_and_trains_targets_only():
    rows = {
        "tokens": np.array([5, 6, 7, 8, 9], np.int32),
        "trained": np.array([0, 1, 1, 0, 1], np.uint8),
        "offsets": np.array([0, 3, 5]),
    }
    batch = collate(rows, [0, 1], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
