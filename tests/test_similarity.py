import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from math import sqrt
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import save_file

from neft_core import similarity
from neft_core.errors import NeftError
from neft_core.masks import NeuronScores
from neft_core.neurons import FAMILIES
from neft_core.similarity import score_neurons, sensitivity


def exact(w: list[float], v: list[float]) -> float:
    """1 - cosine in rational arithmetic up to one final square root.

    1 - c = (1 - c^2) / (1 + c), with c^2 rational.
    """
    a, b = [Fraction(x) for x in w], [Fraction(x) for x in v]
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    square = dot * dot / (sum(x * x for x in a) * sum(y * y for y in b))
    cosine = sqrt(square) * (1 if dot > 0 else -1)
    return float(1 - square) / (1 + cosine) if dot > 0 else 1 - cosine


def test_hand_values():
    base = torch.tensor([[1.0, 0], [1, 0], [1, 0], [3, 4], [2, 0], [0, 0], [0, 0], [1, 2]])
    tuned = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [4, 3], [7, 0], [0, 0], [1, 5], [0, 0]])
    want = [0, 1, 2, 1 - 24 / 25, 0, 0, 1, 1]
    got = sensitivity(base, tuned)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(want, abs=1e-15)
    assert [got[i].item() for i in (0, 2, 4, 5, 6, 7)] == [0, 2, 0, 0, 1, 1]


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-4, 1e-1, 1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_at_every_size_of_change(size, dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 33, generator=generator, dtype=dtype)
    tuned = base + size * torch.randn(8, 33, generator=generator, dtype=dtype)
    got = sensitivity(base, tuned).tolist()
    want = [exact(w, v) for w, v in zip(base.tolist(), tuned.tolist(), strict=True)]
    assert got == pytest.approx(want, rel=1e-11, abs=0)


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-2])
def test_exact_over_thousands_of_weights(size):
    generator = torch.Generator().manual_seed(4)
    base = 0.02 * torch.randn(2, 4096, generator=generator)
    tuned = base + 0.02 * size * torch.randn(2, 4096, generator=generator)
    got = sensitivity(base, tuned).tolist()
    want = [exact(w, v) for w, v in zip(base.tolist(), tuned.tolist(), strict=True)]
    assert got == pytest.approx(want, rel=1e-13, abs=0)


@pytest.mark.parametrize(("turned", "within"), [(1e-2, 1e-12), (1e-4, 1e-11), (1e-6, 1e-9)])
def test_exact_where_the_change_is_nearly_along_the_neuron(turned, within):
    # d.d and (d.w)^2 / w.w agree to `turned` squared, so their difference loses as much.
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    noise = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    tuned = base * (1 + torch.tensor([1e-3, -1e-3, 1.0, -0.5, -1.5, 30])[:, None])
    tuned += turned * (tuned - base) * noise
    got = sensitivity(base, tuned).tolist()
    want = [exact(w, v) for w, v in zip(base.tolist(), tuned.tolist(), strict=True)]
    assert got == pytest.approx(want, rel=within, abs=0)


def test_the_library_s_cosine_loses_what_this_keeps():
    # Why the formula: after a step of 1e-7 the float32 cosine ranks by rounding.
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(400, 256, generator=generator)
    tuned = base + 2e-6 * torch.randn(400, 256, generator=generator)
    double = 1 - torch.cosine_similarity(base.double(), tuned.double(), dim=1)
    single = 1 - torch.cosine_similarity(base, tuned, dim=1)

    def top(values):
        return set(values.argsort(descending=True)[:40].tolist())

    assert top(sensitivity(base, tuned)) == top(double)
    assert len(top(single) & top(double)) < 36


def test_scale_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(5, 16, generator=generator)
    tuned = base + 0.01 * torch.randn(5, 16, generator=generator)
    same = sensitivity(base, tuned)
    assert torch.equal(sensitivity(base * 2**-30, tuned * 2**-30), same)
    assert torch.equal(sensitivity(base.flip(0), tuned.flip(0)).flip(0), same)
    assert sensitivity(base, base * 4).max() < 1e-30


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 1000, 10_000])
def test_a_neuron_s_bits_do_not_depend_on_its_company(width):
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(9, width, generator=generator)
    tuned = base + 0.1 * torch.randn(9, width, generator=generator)
    whole = sensitivity(base, tuned)
    for step in (1, 2, 5):
        parts = zip(base.split(step), tuned.split(step), strict=True)
        assert torch.equal(torch.cat([sensitivity(w, v) for w, v in parts]), whole)
    as_columns = sensitivity(base.t().contiguous().t(), tuned.t().contiguous().t())
    assert torch.equal(as_columns, whole)


def test_inputs_are_left_alone():
    base, tuned = torch.ones(2, 3, dtype=torch.float64), torch.eye(2, 3, dtype=torch.float64)
    before = base.clone(), tuned.clone()
    sensitivity(base, tuned)
    assert torch.equal(base, before[0])
    assert torch.equal(tuned, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("other", [0.0, 1.0])
def test_values_that_are_not_finite_are_refused(value, which, other):
    pair = [torch.full((3, 2), other), torch.full((3, 2), other)]
    pair[which][1, 0] = value
    with pytest.raises(NeftError, match="sensitivity: neuron 1 has a value that is not finite"):
        sensitivity(*pair)


def test_shapes_must_agree():
    with pytest.raises(NeftError, match=re.escape("got shapes (2, 3) and (3, 2)")):
        sensitivity(torch.zeros(2, 3), torch.zeros(3, 2))


HIDDEN, INNER = 6, 10


def llama_weights(
    layers=2, seed=0, prefix="model.", hidden=HIDDEN, inner=INNER
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {f"{prefix}embed_tokens.weight": torch.randn(7, hidden, generator=generator)}
    for n in range(layers):
        for name, shape in {"up": (inner, hidden), "down": (hidden, inner)}.items():
            weights[f"{prefix}layers.{n}.mlp.{name}_proj.weight"] = torch.randn(
                shape, generator=generator
            )
    return weights


def write(directory, weights, model_type="llama", shards=1):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    names, files = list(weights), {}
    for n in range(shards):
        mine = {name: weights[name] for name in names[n::shards]}
        save_file(mine, directory / f"model-{n}.safetensors")
        files |= dict.fromkeys(mine, f"model-{n}.safetensors")
    index = {"weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def tuned_from(weights, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 1e-3 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}


@pytest.mark.parametrize("piece", [1, 13, 25, 1 << 20])
def test_score_reads_rows_and_columns_in_pieces(tmp_path, piece):
    base = llama_weights()
    tuned = tuned_from(base)
    calls = []
    scores = score_neurons(
        write(tmp_path / "base", base),
        write(tmp_path / "tuned", tuned, shards=3),
        provenance={"steps": "800"},
        piece=piece,
        progress=lambda done, total: calls.append((done, total)),
    )
    for module, values in scores.sensitivity.items():
        w, v = base[f"{module}.weight"], tuned[f"{module}.weight"]
        if "down" in module:
            w, v = w.t(), v.t()
        assert torch.equal(values, sensitivity(w, v))
        assert (values > 0).all()
    assert list(scores.sensitivity) == list(scores.groups)
    assert len(scores.sensitivity) == 4
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert scores.provenance == {"steps": "800", "model_type": "llama", "layout": "mlp"}
    assert scores.total_parameters == sum(weight.numel() for weight in base.values())


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    def extra_at_peak(layers: int) -> int:
        weights = llama_weights(layers, hidden=512, inner=1024)
        models = [
            write(tmp_path / "base", weights, shards=2),
            write(tmp_path / "tuned", tuned_from(weights)),
        ]
        del weights
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        score_neurons(*models, threads=1)
        return memory("VmHWM") - before

    matrix = 1024 * 512 * 4
    extra_at_peak(2)  # what a first call loads
    few, many = extra_at_peak(2), extra_at_peak(24)
    assert few > matrix
    assert many < few + 2 * matrix


def memory(field: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or the most there have been (`VmHWM`)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", status)[1])


def test_score_of_conv1d_and_of_names_without_prefix(tmp_path):
    base = {
        "h.0.mlp.c_fc.weight": torch.randn(HIDDEN, INNER),
        "h.0.mlp.c_proj.weight": torch.randn(INNER, HIDDEN),
    }
    tuned = tuned_from(base)
    prefixed = {f"transformer.{name}": weight for name, weight in tuned.items()}
    scores = score_neurons(
        write(tmp_path / "base", base, "gpt2"), write(tmp_path / "tuned", prefixed, "gpt2"), piece=7
    )
    for module, name in (("h.0.mlp.c_fc", "c_fc"), ("h.0.mlp.c_proj", "c_proj")):
        w, v = base[f"{module}.weight"], tuned[f"{module}.weight"]
        want = sensitivity(w, v) if name == "c_proj" else sensitivity(w.t(), v.t())
        assert torch.equal(scores.sensitivity[module], want)


def test_score_of_fused_weights_takes_the_second_half(tmp_path):
    base = {
        "model.layers.0.mlp.gate_up_proj.weight": torch.randn(2 * INNER, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": torch.randn(HIDDEN, INNER),
    }
    tuned = {name: weight.clone() for name, weight in base.items()}
    tuned["model.layers.0.mlp.gate_up_proj.weight"][INNER + 3] += torch.arange(HIDDEN)
    tuned["model.layers.0.mlp.gate_up_proj.weight"][2] += torch.arange(HIDDEN)
    dirs = write(tmp_path / "base", base, "phi3"), write(tmp_path / "tuned", tuned, "phi3")
    module = "model.layers.0.mlp.gate_up_proj"
    assert score_neurons(*dirs).sensitivity[module].nonzero().flatten().tolist() == [3]
    both = score_neurons(*dirs, layout="mlp+gate").sensitivity[module]
    assert both.nonzero().flatten().tolist() == [2, INNER + 3]


def test_a_tuned_model_in_float32_scores_a_base_in_bfloat16(tmp_path):
    base = {name: weight.bfloat16() for name, weight in llama_weights(1).items()}
    tuned = tuned_from({name: weight.float() for name, weight in base.items()})
    only_scored = {name: weight for name, weight in tuned.items() if "mlp" in name}
    scores = score_neurons(write(tmp_path / "base", base), write(tmp_path / "tuned", only_scored))
    name = "model.layers.0.mlp.up_proj"
    want = sensitivity(base[f"{name}.weight"].float(), tuned[f"{name}.weight"])
    assert torch.equal(scores.sensitivity[name], want)


def test_checkpoints_that_do_not_belong_together_are_refused(tmp_path):
    base = llama_weights()
    base_dir = write(tmp_path / "base", base)
    name = "model.layers.1.mlp.down_proj.weight"

    def refuses(weights, text):
        tuned_dir = write(tmp_path / "tuned", weights)
        with pytest.raises(NeftError, match=re.escape(text)) as caught:
            score_neurons(base_dir, tuned_dir)
        assert "\n" not in str(caught.value)

    tuned = tmp_path / "tuned"
    refuses(llama_weights(1), f"{tuned}: has no model.layers.1.mlp.up_proj.weight, {base_dir} has;")
    refuses(llama_weights(3), f"{tuned}: has model.layers.2.mlp.up_proj.weight, {base_dir} has not")
    other = {n: torch.cat((w, w), 0 if "up" in n else 1) for n, w in base.items() if "mlp" in n}
    refuses(other, f"{tuned}: model.layers.0.mlp.up_proj.weight has shape (20, 6), that of")
    refuses({"x": torch.zeros(1)}, f"{tuned}: none of 1 weights is named")
    broken = {n: weight.clone() for n, weight in base.items()}
    broken[name][2, 4] = float("nan")
    refuses(
        broken,
        f"{tuned}/model.safetensors: {name} has a value that is not finite in column 4; make",
    )
    base_dir = write(tmp_path / "bad", broken)
    refuses(base, f"{base_dir}/model.safetensors: {name} has a value that is not finite in")


@pytest.mark.parametrize("layout", ["mlp", "rows"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_models_state_dicts_and_checkpoints_score_the_same_bits(name, tied, layout, tmp_path):
    base, tuned = (tiny_model(name, seed, tie_word_embeddings=tied) for seed in (0, 1))
    base.save_pretrained(tmp_path / "base", max_shard_size="1KB")
    tuned.save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    want = score_neurons(base, tuned, layout)
    assert want.total_parameters == sum(p.numel() for p in base.parameters())
    states = base.state_dict(), tuned.state_dict()
    rivals = [
        score_neurons(tmp_path / "base", str(tmp_path / "tuned"), layout),
        score_neurons(*states, layout, config=base.config),
        score_neurons(tmp_path / "base", tuned, layout),
        score_neurons(base, states[1], layout),
        score_neurons(states[0], tmp_path / "tuned", layout),
    ]
    for got in rivals:
        assert list(got.sensitivity) == list(want.sensitivity)
        for module, values in want.sensitivity.items():
            assert torch.equal(got.sensitivity[module], values)
        assert got.groups == want.groups
        assert got.total_parameters == want.total_parameters
        assert got.provenance == want.provenance
    assert want.axis == {module: group.axis for module, group in want.groups.items()}
    # Against the library's own cosine, neuron by neuron in another order of work.
    for module, group in want.groups.items():
        w, v = (state[group.parameter].double() for state in states)
        if group.experts:
            continue
        if (group.axis == 1) != group.transposed:
            w, v = w.t(), v.t()
        rows = slice(group.start, group.start + group.count)
        cosine = torch.cosine_similarity(w[rows], v[rows], dim=1)
        torch.testing.assert_close(want.sensitivity[module], 1 - cosine, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("least", [0, 1 << 40], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_pieces_nor_threads_nor_the_compiler_change_a_bit(dtype, least, monkeypatch):
    base = {name: weight.to(dtype) for name, weight in llama_weights(2).items()}
    tuned = {name: weight.to(dtype) for name, weight in tuned_from(llama_weights(2)).items()}
    want = score_neurons(base, tuned, model_type="llama", threads=1)
    monkeypatch.setattr(similarity, "_WORTH_COMPILING", least)
    if least:
        monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # nothing is kept from before
        similarity.compiled.cache_clear()
    for piece in (1, 50, None):
        for threads in (1, 3):
            got = score_neurons(base, tuned, model_type="llama", piece=piece, threads=threads)
            for module, values in want.sensitivity.items():
                assert torch.equal(got.sensitivity[module], values)


def test_models_that_cannot_be_compared_are_refused_by_name():
    base = llama_weights(1)
    name = "model.layers.0.mlp.up_proj.weight"

    def refuses(text, tuned=base, **options):
        options = {"model_type": "llama"} | options
        with pytest.raises(NeftError, match=re.escape(text)) as caught:
            score_neurons(base, tuned, **options)
        assert "\n" not in str(caught.value)

    refuses(f"tuned: {name} has dtype int8; use a model that", base | {name: base[name].char()})
    refuses(f"tuned: {name} is on the meta device", base | {name: base[name].to("meta")})
    refuses("tuned: got list; give a model, a state dict or the", [1])
    refuses("base: has no model_type; give model_type or config", model_type=None)
    refuses("model_type: got 'x'; known:", model_type="x")
    broken = base | {name: base[name].clone()}
    broken[name][3, 1] = float("inf")
    refuses(f"tuned: {name} has a value that is not finite in row 3; make the model", broken)


@pytest.mark.parametrize("options", [{"config": 1}, {"model_type": "llama"}])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_one_memory_count_once(tied, options):
    base, tuned = (tiny_model("llama", seed, tie_word_embeddings=tied) for seed in (0, 1))
    options = {"config": base.config} if "config" in options else options
    whole = sum(parameter.numel() for parameter in base.parameters())
    state = base.state_dict()
    for given in (state, dict(reversed(state.items()))):
        assert score_neurons(given, tuned.state_dict(), **options).total_parameters == whole
    # Of copies nothing is known but what the config says.
    copied = {name: weight.clone() for name, weight in state.items()}
    found = score_neurons(copied, tuned.state_dict(), **options).total_parameters
    known = "config" in options or not tied
    assert found == whole + (0 if known else base.lm_head.weight.numel())


def test_a_model_that_has_an_adapter_is_told_to_be_merged():
    from peft import LoraConfig, get_peft_model

    base, tuned = tiny_model("llama"), tiny_model("llama", 1)
    model = get_peft_model(tuned, LoraConfig(r=2, target_modules=["q_proj"]))
    text = "tuned: still has an adapter; call merge_and_unload() first"
    for adapted in (model, tuned, model.state_dict()):
        with pytest.raises(NeftError, match=re.escape(text)):
            score_neurons(base, adapted)
    score_neurons(base, model.merge_and_unload())


def test_what_cannot_compute_here_is_told_before_anything_is_read(tmp_path):
    wrong = {
        "foo": "device: got 'foo' (",
        "meta": "device: got 'meta' (",
        "cuda:99": "device: got 'cuda:99' (",
        3.5: "device: got 3.5 (",
    }
    for device, text in wrong.items():
        with pytest.raises(NeftError, match=re.escape(text)) as caught:
            score_neurons(tmp_path, tmp_path, device=device)
        assert str(caught.value).endswith("); give one that is here, as cpu")
        assert "\n" not in str(caught.value)
    for threads in (-1, 0, 1.5, "2"):
        text = f"threads: got {threads!r}; a whole number from 1 on is needed"
        with pytest.raises(NeftError, match=re.escape(text)):
            score_neurons({}, {}, model_type="llama", threads=threads)


def test_a_file_in_place_of_a_directory_is_told(tmp_path):
    base = write(tmp_path / "base", llama_weights(1))
    file = base / "model.safetensors"
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    for wrong, reason in ((file, "Not a directory"), (tmp_path / "odd", "Is a directory")):
        text = f"{wrong}/config.json: can't be read ({reason}); give the directory of a model in"
        with pytest.raises(NeftError, match=re.escape(text)):
            score_neurons(wrong, base)


def test_provenance_is_kept_as_text(tmp_path):
    weights = llama_weights(1)
    scores = score_neurons(weights, weights, model_type="llama", provenance={"steps": 5})
    scores.save(tmp_path / "s")
    assert NeuronScores.load(tmp_path / "s").provenance == scores.provenance
    assert scores.provenance["steps"] == "5"


def test_the_package_offers_them_without_loading_anything():
    code = (
        "import sys, neft_core\n"
        "assert 'torch' not in sys.modules\n"
        "assert {'NeuronMask', 'NeuronScores', 'score_neurons', 'select_neurons'} <= "
        "set(dir(neft_core))\n"
        "from neft_core import score_neurons, select_neurons, NeuronMask, NeuronScores\n"
        "assert score_neurons.__module__ == 'neft_core.similarity'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import neft_core

    with pytest.raises(AttributeError, match="has no attribute 'scores'"):
        getattr(neft_core, "scores")  # noqa: B009
