"""Fused AdamW against the default, 8-bit Adam and Factored against exact ones, values by hand."""

import pytest
import torch

from neft_core import optimizers
from neft_core.optimizers import (
    BLOCK,
    SMALL,
    Adam8bit,
    Factored,
    adamw,
    codebook,
    dequantise,
    quantise,
)


@pytest.mark.parametrize("signed", [True, False])
def test_codebook_by_hand(signed):
    book, nearest = codebook(signed)
    assert (book.dtype, len(book)) == (torch.float32, 256)
    assert (nearest.dtype, len(nearest)) == (torch.uint8, 65536)
    assert (book.diff() > 0).all()
    assert book[-1] == 1
    top = 64 if signed else 128
    assert ((book > 0.1) & (book < 1)).sum() == top
    assert book[-2].item() == pytest.approx(1 - 0.9 / top / 2)
    positive = book[book > 0]
    assert positive[0].item() == pytest.approx(0.55e-6 if signed else 0.325e-6)
    zero = int((book == 0).nonzero())
    assert zero == (optimizers.ZERO if signed else 0) == (127 if signed else 0)
    if signed:
        assert torch.equal(-book[:127].flip(0), book[128:-1])


@pytest.mark.parametrize("signed", [True, False])
def test_quantised_values_are_the_nearest_of_their_block(signed):
    torch.manual_seed(1)
    values = torch.randn(2, BLOCK + 70) * torch.logspace(0, -8, BLOCK + 70)
    values[0, 5] = 0.0
    values = values if signed else values.abs()
    codes, scales = quantise(values, signed)
    assert (codes.dtype, codes.shape) == (torch.uint8, values.shape)
    largest = [[part.abs().max() for part in row.split(BLOCK)] for row in values]
    assert torch.equal(scales, torch.tensor(largest))
    book, _ = codebook(signed)
    own = torch.tensor([[row[i // BLOCK] for i in range(BLOCK + 70)] for row in largest])
    distances = (book * own[..., None] - values[..., None]).abs()
    if not signed:  # nothing becomes zero
        distances[..., 0] = float("inf")
    error = (dequantise(codes, scales, signed) - values).abs()
    rounding = values.abs() / 2**11 + own * 2**-24  # numbers are looked up in fp16
    assert (error <= distances.amin(2) + 2 * rounding).all()


def test_quantised_zeros_and_largest_values():
    values = torch.zeros(3, 70)
    values[1, 0] = 3.7
    values[2, 9] = 1e-20
    assert torch.equal(dequantise(*quantise(values, True), True), values)
    kept = dequantise(*quantise(values, False), False)
    assert torch.equal(kept[0], values[0])
    assert torch.equal(kept[values > 0], values[values > 0])
    # Beside a large root none is zero.
    assert torch.allclose(kept[1, 1:], torch.tensor(3.7 * 0.325e-6))


def steps_of(make, shape, steps=40, seed=0, spread=0.0, **options):
    """A parameter after steps with the same random gradients, and its optimiser."""
    torch.manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer = make([parameter], lr=1e-2, **options)
    drift, scale = torch.randn(shape), 10.0 ** (spread * torch.randn(shape))
    for _ in range(steps):
        parameter.grad = scale * (torch.randn(shape) + drift)
        optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.parametrize("transposed", [False, True])
def test_adamw_is_torchs(transposed):
    """Also of a parameter whose values are not in the order of its gradient's."""
    torch.manual_seed(0)
    start = torch.randn(40, 30)
    ours = torch.nn.Parameter(start.t().contiguous().t() if transposed else start.clone())
    torchs = torch.nn.Parameter(start.clone())
    assert ours.is_contiguous() != transposed
    pair = [(ours, adamw([ours], lr=1e-2, weight_decay=0.1)),
            (torchs, torch.optim.AdamW([torchs], lr=1e-2, weight_decay=0.1))]  # fmt: skip
    for _ in range(20):
        grad = torch.randn(40, 30)
        for each, optimizer in pair:
            each.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)
    assert (ours - start).abs().min() > 0


@pytest.mark.parametrize("transposed", [False, True])
def test_a_scaler_skips_a_step_that_overflows(transposed):
    start = torch.ones(4, 3)
    parameter = torch.nn.Parameter(start.t().contiguous().t() if transposed else start.clone())
    optimizer, scaler = adamw([parameter], lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, moved in ((1e38, 0.0), (1.0, 0.1)):
        scaler.scale((factor * parameter).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.testing.assert_close(parameter.detach(), start - moved)


@pytest.mark.parametrize(("spread", "limit"), [(0.0, 0.02), (0.3, 0.04), (1.0, 0.15)])
def test_8bit_follows_adamw_within_a_share_of_the_way(spread, limit):
    """`spread`: powers of ten by which gradients in a block differ."""
    start, _ = steps_of(torch.optim.AdamW, (40, 200), steps=0)
    options = {"spread": spread, "weight_decay": 0.1}
    exact, _ = steps_of(torch.optim.AdamW, (40, 200), **options)
    ours, optimizer = steps_of(Adam8bit, (40, 200), **options)
    error = (ours - exact).norm() / (exact - start).norm()
    assert 0 < error < limit
    (state,) = optimizer.state.values()
    kinds = {name: tensor.dtype for name, tensor in state.items() if tensor.numel() > 1}
    fp32 = torch.float32
    assert kinds == {"mean": torch.uint8, "root": torch.uint8,
                     "mean_scale": fp32, "root_scale": fp32}  # fmt: skip


def test_8bit_keeps_small_tensors_exact():
    assert SMALL > 60 * 60
    exact, _ = steps_of(torch.optim.AdamW, (60, 60), weight_decay=0.1)
    ours, _ = steps_of(Adam8bit, (60, 60), weight_decay=0.1)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_8bit_takes_a_single_number():
    exact, _ = steps_of(torch.optim.AdamW, (), weight_decay=0.1)
    ours, _ = steps_of(Adam8bit, (), weight_decay=0.1)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_8bit_does_not_jump_where_gradients_stop():
    """Rows of an embedding that are seen once: their moments fade, beside rows that go on."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    exact = torch.nn.Parameter(torch.zeros(64, 128))
    pair = [(parameter, Adam8bit([parameter], lr=1e-2)),
            (exact, torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.0))]  # fmt: skip
    for step in range(200):
        grad = torch.randn(64, 128)
        grad[1::2] *= 1e-4 if step == 0 else 0.0
        for each, optimizer in pair:
            each.grad = grad.clone()
            optimizer.step()
    assert (parameter - exact)[1::2].abs().max() < 0.01


def test_8bit_is_the_same_bits_piece_by_piece(monkeypatch):
    whole, _ = steps_of(Adam8bit, (70, 130), steps=5)
    monkeypatch.setattr(optimizers, "_PIECE", 4 * 130)
    pieces, _ = steps_of(Adam8bit, (70, 130), steps=5)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("shape", [(30,), (12, 20), (3, 8, 10)])
def test_factored_is_torchs_adafactor_with_an_absolute_rate(shape):
    torch.manual_seed(2)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    mine = Factored([ours], lr=1e-2, weight_decay=0.0)
    library = torch.optim.Adafactor([theirs], lr=1e-2)
    for step in range(25):
        grad = torch.randn(shape) * (10.0 if step == 7 else 1.0)  # one update is scaled down
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        # The library multiplies its rate by the root mean square of the parameter.
        library.param_groups[0]["lr"] = 1e-2 / theirs.detach().square().mean().sqrt().item()
        mine.step()
        library.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_factored_decay_is_decoupled():
    plain, _ = steps_of(Factored, (6, 8), steps=1)
    decayed, _ = steps_of(Factored, (6, 8), steps=1, weight_decay=0.5)
    start, _ = steps_of(Factored, (6, 8), steps=0)
    torch.testing.assert_close(decayed, plain - 1e-2 * 0.5 * start)
