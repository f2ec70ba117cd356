"""The harness of the benchmarks, and each benchmark once on a micro shape."""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import harness, memory, plan, rivals, score, train_step, utilisation, warmup
from neft_core.errors import NeftError


def build(spec):
    """A rival for the tests: counts, refuses, fails or dies on demand."""
    count = spec["start"]

    def answer(command):
        nonlocal count
        if command == "refuse":
            raise NeftError("rival: got refuse; say count")
        if command == "fail":
            raise KeyError(command)
        if command == "die":
            os._exit(7)
        count += 1
        return {"count": count, "pid": os.getpid()}

    return answer


def test_rivals_answer_in_turn_in_processes_of_their_own():
    with harness.workers(build, {"a": {"start": 0}, "b": {"start": 10}}) as rivals:
        answers = harness.repeat(rivals, "count", 3)
        assert [a["count"] for a in answers["a"]] == [1, 2, 3]
        assert [a["count"] for a in answers["b"]] == [11, 12, 13]
        assert len({a["pid"] for both in answers.values() for a in both} | {os.getpid()}) == 3
        with pytest.raises(NeftError, match=r"^rival: got refuse; say count$"):
            rivals["a"].ask("refuse")
        with pytest.raises(RuntimeError, match="KeyError: 'fail'"):
            rivals["a"].ask("fail")
        assert rivals["a"].ask("count")["count"] == 4
        with pytest.raises(NeftError, match=r"^b: its process ended with 7; "):
            rivals["b"].ask("die")


def test_each_round_asks_every_rival_once_in_another_order():
    orders = list(harness.rounds(["a", "b", "c", "d"], 50, seed=1))
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    assert orders == list(harness.rounds(["a", "b", "c", "d"], 50, seed=1))


def test_spread_by_hand():
    assert harness.spread([4.0, 1.0, 2.0, 3.0, 10.0]) == {
        "median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "repeats": 5,
    }  # fmt: skip
    assert harness.spread([2.0])["q3"] == 2.0


def test_ratios_are_formed_round_by_round():
    # The machine was ten times slower in the last round, for both.
    assert harness.ratio([1.0, 1.0, 10.0], [2.0, 2.0, 20.0])["median"] == 0.5
    assert harness.ratio([1.0, 3.0, 10.0], [2.0, 2.0, 20.0])["q3"] == 1.0


def test_the_peak_of_memory_starts_again():
    harness.reset_peak()
    before = harness.peak_resident()
    block = bytearray(b"x" * (64 << 20))
    during = harness.peak_resident()
    assert during - before >= len(block)
    del block
    harness.reset_peak()
    assert harness.peak_resident() < during - (32 << 20)


def test_a_table_and_its_files(tmp_path):
    rows = [{"method": "neft", "ms": "9.1"}, {"method": "full fine-tuning", "ms": "12.0"}]
    text = harness.table(rows)
    assert text == (
        "| method           |   ms |\n"
        "| :--------------- | ---: |\n"
        "| neft             |  9.1 |\n"
        "| full fine-tuning | 12.0 |"
    )
    harness.write(tmp_path / "out" / "step-0.4", {"machine": harness.machine()}, text)
    assert (tmp_path / "out" / "step-0.4.md").read_text() == text
    record = json.loads((tmp_path / "out" / "step-0.4.json").read_text())
    assert record["machine"]["torch"].startswith("2.")


# --- memory ---------------------------------------------------------------------------------


def two_layers() -> nn.Module:
    """[T, 4] to [T, 8] to [T, 3]."""
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))


def kept_bytes(model: nn.Module, x: torch.Tensor, forward=None) -> int:
    with memory.kept_for_backward(model) as kept:
        output = (forward or model)(x)
        counted = kept()
    output.sum().backward()
    return counted


def test_bytes_kept_for_backward_by_hand():
    x = torch.randn(5, 4)
    everything = two_layers()
    # The input, 5 x 4, and the hidden units after ReLU, 5 x 8, which two functions keep.
    assert kept_bytes(everything, x) == 4 * (5 * 4 + 5 * 8)
    last_only = two_layers()
    last_only[0].requires_grad_(False)
    assert kept_bytes(last_only, x) == 4 * (5 * 8)
    frozen = two_layers().requires_grad_(False)
    assert kept_bytes(frozen, x.clone().requires_grad_(True)) == 4 * (5 * 8)
    # A copy of a weight is kept; the weight itself isn't counted.
    copied = two_layers()
    entering = x.clone().requires_grad_(True)
    assert kept_bytes(copied, entering, lambda x: x @ copied[0].weight.t()) == 4 * 5 * 4
    twice = kept_bytes(copied, entering, lambda x: x @ (copied[0].weight.t() * 2))
    assert twice == 4 * (5 * 4 + 4 * 8)


def test_bytes_kept_of_sparse_tensors():
    weight = nn.Parameter(torch.ones(3))
    indices = torch.tensor([[0, 1, 2], [0, 1, 1]])

    def forward(x):
        with torch.sparse.check_sparse_tensor_invariants(False):
            return x @ torch.sparse_coo_tensor(indices, weight, (3, 2)).to_dense()

    holder = nn.ParameterList([weight])
    assert kept_bytes(holder, torch.randn(5, 3), forward) == 4 * 5 * 3 + indices.nbytes


def test_what_stays_between_steps_by_hand():
    model = two_layers()
    model[0].requires_grad_(False)
    model.register_buffer("originals", torch.zeros(10))
    model.chosen = {"default": torch.zeros(6, dtype=torch.int64)}
    model.view = model[0].weight.detach()[:2]
    model.own = SimpleNamespace(held=[torch.zeros(3)])
    model[0].weight.mask = torch.zeros(7)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert memory.resident(model, optimizer) == {
        "parameters": 4 * (32 + 24),
        "buffers": 4 * (10 + 3 + 7) + 8 * 6,
        "gradients": 4 * 24,
        "states": 4 * (24 + 24 + 1),
        "aside": 0,
    }


def test_the_peak_of_a_step_counts_what_is_freed_again():
    def step():
        first = torch.ones(1 << 20)
        second = first + first
        del first
        third = torch.ones(1 << 10)
        del second, third

    assert memory.peak_of(step, torch.device("cpu")) == 2 * (4 << 20)


# --- training step --------------------------------------------------------------------------

MICRO = train_step.SHAPES["micro"]
BLOCK = replace(MICRO, layers=1, block=True)


def spec(method: str, shape=MICRO, **changes) -> train_step.Spec:
    """Two sequences of eight tokens, 9 %, no clipping."""
    return train_step.Spec(
        **{
            "method": method, "shape": shape, "percent": 9.0, "layout": "mlp", "rank": 0,
            "skew": 0.0, "batch": 2, "length": 8, "dtype": "float32", "device": "cpu", "threads": 1,
            "clip": 0.0, "adamw": "fused", "warmup": 0,
        } | changes
    )  # fmt: skip


H, M, L, V = MICRO.hidden, MICRO.intermediate, MICRO.layers, MICRO.vocab
IN_LINEARS = L * (4 * H * H + 3 * H * M)
SIDES = L * (4 * 2 * H + 3 * (H + M))


def test_counts_of_every_method():
    facts = {name: rivals.Rival(spec(name)).facts() for name in rivals.PREPARE}
    total = IN_LINEARS + 2 * V * H + (2 * L + 1) * H
    assert {f["parameters"] for f in facts.values()} == {total}
    neurons = int(0.09 * total / H)
    rank = max(1, neurons * H // SIDES)
    assert {name: f["trained"] for name, f in facts.items()} == {
        "floor": 0, "full": total, "masked": L * 2 * M * H, "neft": neurons * H,
        "lora": rank * SIDES, "shira": rank * SIDES,
    }  # fmt: skip
    assert {f["neurons"] for f in facts.values()} == {neurons}
    tokens, products = 16, IN_LINEARS + V * H
    assert {f["tokens"] for f in facts.values()} == {tokens}
    assert facts["floor"]["flops"] == 4 * products * tokens
    assert facts["full"]["flops"] == 6 * products * tokens
    assert facts["neft"]["flops"] <= (4 * products + 2 * neurons * H) * tokens
    assert facts["floor"]["adapter"] == 0
    assert facts["full"]["adapter"] == 4 * total
    assert facts["neft"]["adapter"] == 4 * neurons * H + 8 * neurons


def test_a_block_costs_what_arithmetic_says():
    products = 4 * H * H + 3 * H * M
    facts = {name: rivals.Rival(spec(name, BLOCK)).facts() for name in ("floor", "full", "neft")}
    assert facts["full"]["parameters"] == facts["full"]["trained"] == products + 3 * H
    assert facts["floor"]["flops"] == 4 * products * 16
    assert facts["full"]["flops"] == 6 * products * 16
    assert facts["neft"]["flops"] == (4 * products + 2 * facts["neft"]["trained"]) * 16


@pytest.mark.parametrize(("shape", "layout"), [(MICRO, "mlp"), (MICRO, "all"), (BLOCK, "mlp")])
def test_masked_and_neft_train_the_same(shape, layout):
    changes = {"layout": layout, "warmup": 3}
    both = [rivals.Rival(spec(name, shape, **changes)) for name in ("masked", "neft")]
    assert len(both[0].mask.groups) == shape.layers * {"mlp": 2, "all": 7}[layout]
    before = dict(rivals.Rival(spec("floor", shape)).model.named_parameters())
    models = both[0].model, both[1].model.merge_and_unload()
    weights = [dict(model.named_parameters()) for model in models]
    for name, group in both[0].mask.groups.items():
        masked, neft = (of_model[f"{name}.weight"] for of_model in weights)
        # Three steps move a weight by about 3e-4; AdamW magnifies the rounding of tiny gradients.
        torch.testing.assert_close(masked, neft, rtol=0, atol=1e-5)
        moved = (masked != before[f"{name}.weight"]).any(1 - group.axis)
        selected = both[0].mask.indices.get(name, torch.empty(0))
        assert moved.nonzero().flatten().tolist() == selected.tolist()


@pytest.mark.parametrize("shape", [MICRO, BLOCK])
@pytest.mark.parametrize("name", rivals.PREPARE)
def test_every_method_learns_and_is_measured(name, shape):
    rival = rivals.Rival(spec(name, shape, clip=1.0, dtype="bfloat16"))
    before = {key: p.detach().clone() for key, p in rival.trained.items()}
    taken = rival.answer("step")
    assert all(
        (rival.trained[key] != old).any() for key, old in before.items() if "lora_A" not in key
    )
    assert taken.keys() == {"wall", "cpu", "forward", "backward", "update"}
    parts = rival.answer("memory")
    assert parts.keys() == set(train_step.PARTS)
    assert parts["sum"] == sum(parts[part] for part in train_step.PARTS[:5])
    assert parts["peak"] > parts["parameters"] + parts["states"] + parts["kept"] // 2
    assert parts["gradients"] == 4 * sum(p.numel() for p in rival.trained.values())


def test_the_rank_of_as_many_parameters():
    model = rivals.random_model(MICRO, torch.float32, torch.device("cpu"))
    ranks = [rivals.rank_for(model, count) for count in (0, SIDES, 10 * SIDES - 1, 10 * SIDES)]
    assert ranks == [1, 1, 9, 10]
    given = [rivals.Rival(spec(name, rank=3)).facts()["trained"] for name in ("lora", "shira")]
    assert given == [3 * SIDES] * 2


def test_a_mask_for_more_than_all_takes_all_and_skew_crowds_it():
    model = rivals.random_model(MICRO, torch.float32, torch.device("cpu"))
    assert rivals.random_mask(model, 43.0, "mlp", 0.0).neurons == L * 2 * M == 96
    even, skewed = (rivals.random_mask(model, 9.0, "mlp", skew) for skew in (0.0, 2.0))
    assert even.neurons == skewed.neurons
    largest = [max(c.selected for c in mask.by_module().values()) for mask in (even, skewed)]
    assert largest[1] > largest[0] + 4


def test_the_command_end_to_end(tmp_path, capsys):
    out = tmp_path / "step"
    command = "--shape micro --length 8 --repeats 2 --threads 1 --methods floor,neft --percent 9"
    assert (
        harness.main(train_step.arguments, train_step.run, [*command.split(), "--out", str(out)])
        == 0
    )
    text = out.with_suffix(".md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["command"]["percent"] == [9.0]
    assert record["shape"]["hidden"] == H
    assert [budget["percent"] for budget in record["budgets"]] == [9.0]
    floor, neft = (record["budgets"][0]["methods"][name] for name in ("floor", "neft"))
    assert neft["wall"]["repeats"] == len(neft["steps"]) == 2
    assert neft["tokens_per_second"] == 16 / neft["wall"]["median"]
    assert neft["ratio"].keys() == {"floor"}
    pairs = zip(neft["steps"], floor["steps"], strict=True)
    ratios = sorted(mine["cpu"] / other["cpu"] for mine, other in pairs)
    assert ratios[0] <= neft["ratio"]["floor"]["cpu"]["median"] <= ratios[1]
    lines = [line for line in text.splitlines() if line.startswith("| neft ")]
    assert [len(line.split("|")) for line in lines] == [16, 13]


def test_a_method_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as ended:
        train_step.arguments(["--methods", "neft,lorra"])
    assert ended.value.code == 2
    assert "--methods: got lorra; allowed are floor, full, masked, neft, lora" in (
        capsys.readouterr().err
    )


# --- the others -----------------------------------------------------------------------------


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables of a text: a dictionary for each row."""
    found: list[list[dict[str, str]]] = []
    head: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
            found.append([])
        elif set(line) - set("|-: "):
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


@pytest.mark.slow
def test_scoring_beside_reading_end_to_end(tmp_path):
    out = tmp_path / "score"
    command = "--shape micro --dtype bf16/fp32 --rivals read,score --repeats 1 --threads 1 --out"
    assert harness.main(score.arguments, score.run, [*command.split(), str(out)]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    (found,) = record["dtypes"].values()
    read, mine = found["read"], found["score"]
    sizes = score.SHAPES["micro"]
    h, i, layers = sizes.hidden, sizes.intermediate, sizes.layers
    # Of bf16 and fp32, 2 and 4 bytes a weight; scoring reads up and down alone.
    assert read["bytes"]["median"] == 6 * (layers * (4 * h * h + 3 * h * i) + 2 * sizes.vocab * h)
    assert mine["bytes"]["median"] == 6 * layers * 2 * h * i
    for clock in ("wall", "cpu"):
        assert mine[clock]["median"] > 0
        assert mine["of read"][clock]["median"] == read[clock]["median"] / mine[clock]["median"]
    ((first, second),) = tables(out.with_suffix(".md").read_text())
    assert [first["rival"], second["rival"]] == ["read", "score"]
    assert first["speed of read, wall / CPU"] == "1.00 / 1.00"
    shares = [mine["of read"][clock]["median"] for clock in ("wall", "cpu")]
    assert second["speed of read, wall / CPU"] == " / ".join(f"{share:.2f}" for share in shares)


@pytest.mark.slow
def test_utilisation_beside_a_sum_end_to_end(tmp_path):
    out = tmp_path / "utilisation"
    command = "--hidden 16 --intermediate 24 --dtype float32 --repeats 1 --threads 1 --out"
    assert harness.main(utilisation.arguments, utilisation.run, [*command.split(), str(out)]) == 0
    found = json.loads(out.with_suffix(".json").read_text())["found"]["float32"]
    assert (found["neurons"], found["matrix"]) == (32 * 2 * 24, 4 * 16 * 24)
    assert found["bytes"] == 32 * 2 * found["matrix"]
    ((row,),) = tables(out.with_suffix(".md").read_text())
    assert (row["weights"], row["neurons"]) == ("float32", "1,536")
    for rival in utilisation.RIVALS:
        assert found[rival]["wall"]["median"] > 0
        assert row[f"{rival} wall, s"] == f"{found[rival]['wall']['median']:.1f}"


@pytest.mark.slow
def test_forecasts_beside_steps_end_to_end(tmp_path, monkeypatch, capsys):
    out = tmp_path / "plan"
    command = "--shape micro --method neft --dtype float32 --batch 2x8 --checkpointing 0 --out"
    monkeypatch.setattr(sys, "argv", ["plan", *command.split(), str(out)])
    plan.main()
    text = out.with_suffix(".md").read_text()
    assert capsys.readouterr().out == text
    (found,) = json.loads(out.with_suffix(".json").read_text())["runs"]
    ((row,),) = tables(text)
    assert row["method"] == "neft 9 %"
    assert found["measured"]["sum"] == sum(found["parts"].values())
    for key in ("kept", "sum", "peak"):
        forecast, measured = found["forecast"][key], found["measured"][key]
        assert forecast > 0 < measured
        assert row[key] == f"{forecast / 1e6:,.1f} / {measured / 1e6:,.1f}"
        assert row[f"{key} off"] == f"{100 * (forecast / measured - 1):+.1f} %"
    assert abs(found["forecast"]["sum"] / found["measured"]["sum"] - 1) < 0.1
    forecast, measured = found["seconds"]["forecast"], found["seconds"]["measured"]
    assert row["step"] == f"{forecast:.3g} / {measured:.3g}"
    assert row["of measured"] == f"{forecast / measured:.2f}"
    assert forecast > 0 < measured


@pytest.mark.slow
def test_cost_of_warm_ups_end_to_end(tmp_path, monkeypatch, capsys):
    command = "cost --tokens 16 --turns 1 --hidden 192 --layers 1 --variants exact 8bit --out"
    monkeypatch.setattr(sys, "argv", ["warmup", *command.split(), str(tmp_path)])
    warmup.main()
    found = json.loads((tmp_path / "cost.json").read_text())
    ((first, second),) = tables(capsys.readouterr().out)
    assert [first["warm-up"], second["warm-up"]] == list(found) == ["exact", "8bit"]
    exact, small = found.values()
    for row, cells in ((exact, first), (small, second)):
        assert row["measured states"] == pytest.approx(row["states"], rel=0.02)
        assert row["measured gradients"] == row["gradients"] == row["weights"]
        assert row["peak"] >= row["weights"] + row["measured states"] + row["gradients"]
        assert row["time ratio"] == row["seconds"][0] / exact["seconds"][0] > 0
        assert cells["of exact"] == f"{row['peak'] / exact['peak']:.2f}"
    assert small["states"] < 0.3 * exact["states"]


@pytest.mark.slow
def test_overlaps_of_warm_ups_end_to_end(finished, tmp_path, monkeypatch, capsys):
    command = "--steps 2 --seeds 1 --variants exact 8bit --out"
    argv = ["warmup", "overlap", str(finished.root), *command.split(), str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    warmup.main()
    found = json.loads((tmp_path / "overlap.json").read_text())
    assert list(found) == ["exact, other seed | 2", "8bit | 2"]
    chance, *rows = tables(capsys.readouterr().out)[0]
    assert chance["warm-up"] == "chance"
    for row, (label, entry) in zip(rows, found.items(), strict=True):
        assert f"{row['warm-up']} | {row['K']}" == label
        for percent, shares in entry["overlap"].items():
            assert row[f"{percent} %"] == f"{100 * shares[0]:.1f}"
            assert 0 < shares[0] <= 1
    # Two steps with states in 8 bit go much the way of the exact ones; another seed hardly does.
    at_12 = [entry["overlap"]["12"][0] for entry in found.values()]
    assert at_12[1] > at_12[0]
