"""What the machine did beside a training: sampled, kept short, shown as MLflow's system metrics."""

import csv
import json
import random
import time

import numpy as np
import pytest
import torch
from operating import until

from neft_core import machine, records

CPU = torch.device("cpu")


def rows(file):
    with file.open(newline="") as handle:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(handle)]


def test_samples_grow_in_a_file_and_are_kept_short(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "EVERY", 0.001)
    monkeypatch.setattr(machine, "MOST", 4)
    file = tmp_path / "live/system.csv"
    file.parent.mkdir()
    file.write_text("of an earlier training\n")
    with machine.sampled(file, CPU) as samples:
        until(lambda: file.is_file() and len(rows(file)) > 12)
        time.sleep(0.5)
    written = rows(file)
    assert len(written) < 30, "ever more rarely: 500 of them fit into the half second"
    assert 2 <= len(samples) <= 4
    assert samples[0] == written[0]
    places = [written.index(sample) for sample in samples]
    assert places == sorted(set(places))
    assert written[0].keys() == {
        "time", "cpu_utilization_percentage", "process_memory_usage_megabytes",
        "system_memory_usage_megabytes", "system_memory_usage_percentage",
    }  # fmt: skip
    assert all(0 <= row["cpu_utilization_percentage"] <= 100 for row in written)
    assert written[0]["process_memory_usage_megabytes"] > 50

    points = records.history(file.parent)
    assert {p.name.partition("/")[0] for p in points} == {"system"}
    assert len({p.place for p in points}) == 4 * len({row["time"] for row in written})


def test_a_short_training_has_one_sample_and_draws_nothing(tmp_path):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with machine.sampled(None, CPU) as samples:
        pass
    assert len(samples) == 1
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_what_can_not_be_sampled_ends_nothing(tmp_path):
    """No GPU is there to be asked, or no folder to write to."""
    with machine.sampled(None, torch.device("cuda", 0)) as samples:
        pass
    assert samples == [] or torch.cuda.is_available()
    with pytest.raises(KeyError), machine.sampled(None, CPU):
        raise KeyError


def test_every_seed_of_a_run_is_sampled(finished):
    kept = json.loads(finished.path("cost", "neft.json").read_text())["seeds"]
    for seed in (1, 2):
        assert len(kept[str(seed)]["system"]) >= 1
        points = records.system(finished, "neft", seed)
        assert points[0].step == 0
        assert {p.name for p in points} >= {"system/cpu_utilization_percentage"}
        assert "cost/system" not in records.cost(finished, "neft", seed)
        assert (finished.state("live/train/neft") / f"seed-{seed}/system.csv").is_file()
