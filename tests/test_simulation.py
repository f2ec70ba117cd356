"""Forecasts of a step against a real one: bytes by torch's allocator, hooks and flop counter."""

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from neft_core import models
from neft_core.forecast import Subject, Training, forecast, generation, prepared
from neft_core.simulation import Batch, adamw, fake, simulate_step
from neft_core.tracker import Tracker, Work

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

    def __init__(self, model, batch, autocast, checkpointing=False):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.model, self.autocast = model.train(), autocast
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained)
        self.ids = torch.randint(3, 300, (batch.rows, batch.tokens))
        self.mask = torch.ones_like(self.ids)
        self.mask[0, -1] = 0
        self.kept = 0
        self.step()

    def step(self):
        own = {
            t.untyped_storage().data_ptr()
            for t in (*self.model.parameters(), *self.model.buffers())
        }
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        on = self.autocast is not None
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast("cpu", dtype=self.autocast, enabled=on):
                logits = self.model(input_ids=self.ids, attention_mask=self.mask).logits
            chosen = (logits.float() if on else logits)[:, :-1][self.mask[:, 1:] >= 0].float()
            del logits
            loss = nn.functional.cross_entropy(chosen, self.ids[:, 1:].flatten(), reduction="sum")
        del chosen
        self.kept = sum(size for key, size in kept.items() if key not in own)
        loss.backward()
        del loss
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak(self):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step()
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [v for state in self.optimizer.state.values() for v in state.values()]
        return peak + sum({t.data_ptr(): t.nbytes for t in tensors}.values())


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


def test_an_update_in_the_backward_pass_keeps_one_gradient():
    of = subject()
    model, _ = prepared(of, Training("full", Batch(1, 4)))
    step = simulate_step(model, Batch(1, 4), optimizer=adamw(False), in_backward=True)
    assert step.gradients == 4 * 300 * 64
    after = forecast(of, Training("full", Batch(1, 4)))
    assert step.peak < after.peak - (after.step.gradients - step.gradients) / 2


def test_a_dev_loss_and_a_generation_count(monkeypatch):
    of = subject()
    small = Training("embed", Batch(1, 8))
    large = Training("embed", Batch(1, 8), dev=Batch(64, 100))
    logits = 64 * 100 * 300 * 4
    assert forecast(of, large).peak > forecast(of, small).peak + logits
    peak, work = generation(of, small, 5, 60)
    cache = 2 * 2 * 5 * 60 * 64 * 4
    assert 4 * of.parameters + cache < peak < 4 * of.parameters + 4 * cache
    assert work.flops > 2 * 5 * 60 * (of.parameters - 300 * 64)


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
