"""Forecasts of a step against a real one: bytes by torch's allocator, hooks and flop counter."""

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tiny_rows
from families import tiny_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import kept_for_backward, resident
from neft_core import forecast as forecast_of
from neft_core import models, patterns
from neft_core.activations import activation_scores
from neft_core.again import as_it_is
from neft_core.evaluation import log_likelihoods
from neft_core.forecast import Subject, Training, forecast, generation, prepared
from neft_core.gradients import gradient_scores
from neft_core.methods import trained_parameters
from neft_core.optimizers import InBackward, per_parameter
from neft_core.probing import sentence_states
from neft_core.simulation import Batch, fake
from neft_core.tracker import Tracker, Work
from neft_core.warmups import MODULES, STATES, Warmup

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
METHODS = {
    "full": {},
    "in_out": {},
    "embed": {},
    "lora": {"rank": 4},
    "neft": {"percent": 9.0},
}


def subject(dtype=torch.float32, **sizes):
    config = tiny_llama(**SIZES | sizes).config
    return Subject(config, dtype, None if dtype == torch.float32 else torch.bfloat16)


def on_cpu(subject, training, monkeypatch):
    """The prepared model with real values."""
    real = models.skeleton
    with monkeypatch.context() as patch:
        patch.setattr(models, "skeleton", lambda *a, **k: real(*a, **k | {"device": "cpu"}))
        return prepared(subject, training)[0]


class Real:
    """A real step, written out as the loop does it; measured by torch's own means."""

    def __init__(self, model, batch, autocast, checkpointing=False, way=None, max_norm=1.0):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        way = way or Warmup()
        self.model, self.autocast = model.train(), autocast
        self.trained = list(trained_parameters(model).values())
        inside = way.update == "in_backward"
        groups = per_parameter(self.trained) if inside else self.trained
        self.optimizer = STATES[way.states](groups, lr=1e-3)
        self.updates = InBackward(self.optimizer, max_norm) if inside else None
        self.ids = torch.randint(3, 64, (batch.rows, batch.tokens))
        self.mask = torch.ones_like(self.ids)
        self.mask[0, -1] = 0
        self.kept = 0
        # The first step needs what later ones don't: originals lie in memory still.
        self.first = self._peak()

    def step(self):
        if self.updates:
            self.updates.step(self.backward)
            return
        self.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self):
        own = {
            t.untyped_storage().data_ptr()
            for t in (*self.model.parameters(), *self.model.buffers())
        }
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        on = self.autocast is not None
        with torch.autograd.graph.saved_tensors_hooks(pack, as_it_is):
            with torch.autocast("cpu", dtype=self.autocast, enabled=on):
                logits = self.model(input_ids=self.ids, attention_mask=self.mask).logits
            chosen = (logits.float() if on else logits)[:, :-1][self.mask[:, 1:] >= 0].float()
            del logits
            loss = nn.functional.cross_entropy(chosen, self.ids[:, 1:].flatten(), reduction="sum")
        del chosen
        self.kept = sum(size for key, size in kept.items() if key not in own)
        loss.backward()
        return 0.0

    def states(self):
        return sum(v.nbytes for state in self.optimizer.state.values() for v in state.values())

    def peak(self):
        return max(self.first, self._peak())

    def _peak(self):
        held = resident(self.model, self.optimizer)  # originals of trained neurons too
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step()
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak + sum(size for part, size in held.items() if part not in ("gradients", "aside"))


@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_needs_what_was_forecast(method, dtype, checkpointing, monkeypatch):
    batch = Batch(3, 40)
    training = Training(method, batch, METHODS[method], checkpointing=checkpointing)
    of = subject(dtype)
    need = forecast(of, training)
    real = Real(on_cpu(of, training, monkeypatch), batch, of.autocast, checkpointing)
    assert need.step.activations == pytest.approx(real.kept, rel=0.01)
    assert need.step.peak == pytest.approx(real.peak(), rel=0.05)
    trained = sum(p.numel() for p in real.trained)
    assert need.step.parameters == trained
    # AdamW counts the steps of each parameter in four more bytes.
    assert need.step.states == 8 * trained + 4 * len(real.trained)
    assert need.step.gradients == need.step.trained == 4 * trained


@pytest.mark.parametrize("method", ["full", "lora", "neft"])
def test_the_work_of_a_step_is_that_of_a_real_one(method, monkeypatch):
    batch = Batch(2, 32, padded=False)
    training = Training(method, batch, METHODS[method])
    of = subject()
    step = forecast(of, training).step
    model = on_cpu(of, training, monkeypatch).train()
    ids = torch.randint(3, 300, (2, 32))
    with (
        FlopCounterMode(display=False) as counted,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        logits = model(input_ids=ids).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    # The flash kernel's backward multiplies queries with keys once more; below the first trained
    # weight there is no backward.
    layers = 1 if method == "neft" else 2
    heads, width = 2, 32
    again = layers * 2 * batch.rows * heads * 32 * 32 * width
    assert step.pass_.flops == counted.get_total_flops() + again


def test_a_step_of_full_fine_tuning_is_six_times_its_weights():
    of = subject()
    batch = Batch(1, 8, padded=False)
    step = forecast(of, Training("full", batch)).step
    products = of.parameters - sum(
        p.numel() for n, p in of.model().named_parameters() if "norm" in n
    )
    attention = 2 * 7 * 2 * 2 * 8 * 8 * 32
    # METHOD: 6 N for each token; the tied embedding is looked up for nothing.
    assert step.pass_.flops == 6 * products * 8 + attention


def test_gradients_of_earlier_micro_batches_count():
    of, one = subject(), Training("full", Batch(2, 4))
    several = forecast(of, Training("full", Batch(2, 4), accumulation=2))
    assert several.peak > forecast(of, one).peak


@pytest.mark.parametrize(
    ("way", "max_norm"),
    [
        (Warmup(states="8bit"), 1.0),
        (Warmup(states="factored"), 1.0),
        (Warmup(update="in_backward"), 1.0),
        (Warmup(states="8bit", update="in_backward"), float("inf")),
        (Warmup("candidates", "mlp", states="factored", update="in_backward"), 1.0),
        (Warmup("lora", rank=4), 1.0),
    ],
)
def test_a_warmup_needs_what_was_forecast(way, max_norm, monkeypatch):
    batch, of = Batch(2, 8), subject(intermediate_size=160)
    training = Training("full", batch, warmup=way, max_grad_norm=max_norm)
    need = forecast(of, training)
    real = Real(on_cpu(of, training, monkeypatch), batch, None, way=way, max_norm=max_norm)
    sizes = [p.nbytes for p in real.trained]
    assert need.step.trained == sum(sizes)
    assert need.step.states == real.states()
    assert need.step.gradients == (sum if way.update == "after_backward" else max)(sizes)
    assert need.step.activations == pytest.approx(real.kept, rel=0.01)
    assert need.step.peak == pytest.approx(real.peak(), rel=0.05)


@pytest.mark.parametrize("method", ["full", "neft"])
def test_a_step_whose_peak_is_the_update_needs_what_was_forecast(method, monkeypatch):
    batch, of = Batch(1, 2), subject(intermediate_size=512, vocab_size=64)
    training = Training(method, batch, {"percent": 40.0} if method == "neft" else {})
    need = forecast(of, training).step
    assert need.peak > need.frozen + need.trained + need.gradients + need.states
    real = Real(on_cpu(of, training, monkeypatch), batch, None)
    assert need.peak == pytest.approx(real.peak(), rel=0.02)


def test_clipping_in_the_backward_pass_computes_twice():
    way = Warmup(update="in_backward")
    clipped, plain, after = (
        forecast(subject(), Training("full", Batch(1, 8), warmup=way, max_grad_norm=norm)).step
        for way, norm in ((way, 1.0), (way, float("inf")), (Warmup(), 1.0))
    )
    assert clipped.pass_.flops == 2 * plain.pass_.flops == 2 * after.pass_.flops


@pytest.mark.parametrize("modules", MODULES)
def test_a_tuned_model_is_as_large_as_forecast(modules, tmp_path, monkeypatch):
    extra = {"candidates": {"layout": "mlp"}, "lora": {"rank": 4}}.get(modules, {})
    of = subject(torch.bfloat16)
    training = Training("full", Batch(1, 4), warmup=Warmup(modules, **extra))
    scored = patterns.scorable(of.shapes)
    tuned = MODULES[modules].finish(on_cpu(of, training, monkeypatch), scored)
    models.save_checkpoint(tuned, tmp_path, scored, torch.bfloat16)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert forecast(of, training).kept < written < forecast(of, training).kept + 8192


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_are_forecast_as_if_evenly_used(model_type, monkeypatch):
    config = tiny_model(model_type, mlp_only_layers=[], hidden_size=16).config
    of, batch = Subject(config, torch.float32), Batch(4, 16)
    training = Training("neft", batch, {"share": 0.5})
    need = forecast(of, training)
    torch.manual_seed(0)
    model = on_cpu(of, training, monkeypatch)
    with kept_for_backward(model) as kept:
        ids = torch.randint(3, 16, (4, 16))
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        logits = model(input_ids=ids, attention_mask=mask).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert need.step.activations == pytest.approx(kept(), rel=0.02)
    assert need.step.trained == 4 * 16 * need.selected


def test_a_dev_loss_and_a_generation_count(monkeypatch):
    of = subject()
    small = Training("embed", Batch(1, 8))
    large = Training("embed", Batch(1, 8), dev=Batch(64, 100))
    logits = 64 * 100 * 300 * 4
    assert forecast(of, large).peak > forecast(of, small).peak + logits
    weights, peak, work, token = generation(of, small, 5, 20, 40)
    assert weights == 4 * of.parameters + sum(b.nbytes for b in of.model().buffers())
    cache = 2 * 2 * 5 * 60 * 64 * 4
    assert 4 * of.parameters + cache < peak < 4 * of.parameters + 4 * cache
    assert 20 * token.flops > work.flops > 2 * 5 * 20 * (of.parameters - 300 * 64)


def real_model(of):
    return models.skeleton(of.config, of.dtype, device="cpu").eval()


def highest(model, action):
    """Bytes at the peak of what is done with a real model."""
    with Tracker() as tracker:
        tracker.hold([*model.parameters(), *model.buffers()])
        action()
        return tracker.peak


@pytest.mark.parametrize(("prompt", "new"), [(40, 2), (4, 50)])
def test_a_generation_is_forecast_with_the_cache_at_its_end(prompt, new):
    of = subject(max_position_embeddings=128)
    model, rows = real_model(of), 5
    model.generation_config = type(model.generation_config)()
    ids = torch.randint(3, 300, (rows, prompt))
    found = highest(
        model, lambda: model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
    )
    assert generation(of, None, rows, prompt, new)[1] == pytest.approx(found, rel=0.05)


def test_likelihoods_are_forecast():
    of, rows = subject(), tiny_rows(6, longest=40)
    rows["prompts"] = np.diff(rows["offsets"]) - 3
    model, lengths = real_model(of), np.diff(rows["offsets"])
    found = highest(
        model, lambda: log_likelihoods(model, rows, pad=0, batch_size=6, label="likelihoods")
    )
    kept = int(lengths.max() - rows["prompts"].min())
    forecast_ = forecast_of.likelihood(of, None, 6, int(lengths.max()), kept)
    assert forecast_[1] == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("memory", [1e9, 1.0])
def test_scores_by_gradient_are_forecast(memory):
    of = subject()
    model = real_model(of)
    batches = [batch_of(4, 30, seed) for seed in (1, 2)]
    found = highest(model, lambda: gradient_scores(model, batches, "all", memory=memory))
    _, peak, work = forecast_of.gradients(of, Batch(4, 30), "all", memory)
    assert peak == pytest.approx(found, rel=0.05)
    more = forecast_of.gradients(of, Batch(4, 30), "all", 1e9)[2]
    assert (work.flops > more.flops) == (memory == 1)


def test_scores_by_probe_are_forecast():
    of = subject()
    model = real_model(of)
    layers = ["model.layers.0", "model.layers.1"]
    found = highest(model, lambda: sentence_states(model, layers, [batch_of(4, 30)]))
    _, peak, _, kept = forecast_of.states(of, 4, 30, "mlp")
    assert peak == pytest.approx(found, rel=0.05)
    assert kept == 4 * 2 * 64 * 4


@pytest.mark.parametrize("layout", ["mlp", "all"])
def test_scores_by_activation_are_forecast(layout):
    of = subject()
    base, tuned = real_model(of), real_model(of)

    def score():
        with Tracker() as tracker:
            tracker.hold(t for m in (base, tuned) for t in (*m.parameters(), *m.buffers()))
            activation_scores(base, tuned, [batch_of(8, 60)], layout)
            return tracker.peak

    weights, peak, _ = forecast_of.activations(of, 8, 60, layout)
    assert weights == 2 * (4 * of.parameters + sum(b.nbytes for b in of.model().buffers()))
    assert peak == pytest.approx(score(), rel=0.1)


def batch_of(rows, tokens, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(3, 300, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def test_a_tied_weight_counts_once():
    of = subject()
    model = of.model()
    with fake(model) as tracker:
        assert tracker.live == 4 * of.parameters + sum(b.nbytes for b in model.buffers())
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tracker_counts_storages_once_and_forgets_what_is_gone():
    with Tracker() as tracker:
        a = torch.zeros(100)
        view = a[:50]
        assert tracker.live == 400
        del a
        assert tracker.live == 400
        del view
        assert (tracker.live, tracker.peak) == (0, 400)
        b = torch.ones(10, 10) @ torch.ones(10, 10)
    assert tracker.work.flops == 2 * 10**3
    assert len(b) == 10


def test_works_add_and_scale():
    work = Work(10, 20, 3) + Work(1, 1, 1) * 2
    assert work == Work(12, 22, 5)
    assert work * 0.5 == Work(6, 11, 2)
