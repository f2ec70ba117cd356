import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neft_core.errors import NeftError
from neft_core.files import load_tensors
from neft_core.groups import Group
from neft_core.masks import Count, NeuronMask, NeuronScores

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
GROUPS = {UP: Group(UP, 0, 0, 6, 4), DOWN: Group(DOWN, 1, 0, 6, 4)}
MADE = {"base": "3f2a" * 16, "layout": "mlp", "model_type": "llama", "policy": "lowest"}


def mask(up=(), down=(), **made) -> NeuronMask:
    indices = {UP: torch.tensor(up, dtype=torch.int64), DOWN: torch.tensor(down, dtype=torch.int64)}
    return NeuronMask(
        {module: rows for module, rows in indices.items() if len(rows)},
        GROUPS,
        1000,
        {**MADE, **made},
    )


def content(chosen: NeuronMask) -> dict[str, list[int]]:
    return {module: rows.tolist() for module, rows in chosen.indices.items()}


def test_counts():
    chosen = mask(up=[0, 5], down=[3])
    assert chosen.neurons == 3
    assert chosen.parameters == 12
    assert chosen.percent == pytest.approx(1.2)
    assert chosen.axis == {UP: 0, DOWN: 1}
    assert mask(down=[3]).by_module() == {UP: Count(0, 6), DOWN: Count(1, 6)}


def test_set_operations():
    a, b = mask([0, 2, 5], [1]), mask([2, 3], [])
    assert content(a | b) == {UP: [0, 2, 3, 5], DOWN: [1]}
    assert content(a & b) == {UP: [2]}
    assert content(a - b) == {UP: [0, 5], DOWN: [1]}
    assert content(b - a) == {UP: [3]}
    assert content(a - a) == {}
    assert (a | b).neurons == a.neurons + b.neurons - (a & b).neurons
    assert a.overlap(b) == 0.25
    assert b.overlap(a) == 0.5
    assert a.overlap(a) == 1.0


def test_a_combination_says_what_it_is_made_of():
    made = (mask([0], data="fr") | mask([1], data="zh")).provenance
    assert made["data"] == "(fr) | (zh)"
    assert made["layout"] == "mlp"


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (mask([0], base="91bc" * 16), "mask: base is 3f2a3f2a3f2a..., that of mask is 91bc"),
        (mask([0], layout="mlp+gate"), "mask: layout is mlp, that of mask is mlp+gate"),
        (replace(mask([0]), groups={UP: GROUPS[UP]}), "mask: its candidates differ from those of"),
    ],
)
def test_masks_of_different_models_are_not_combined(other, text):
    for combine in (NeuronMask.__or__, NeuronMask.__and__, NeuronMask.__sub__, NeuronMask.overlap):
        with pytest.raises(NeftError, match=re.escape(text)):
            combine(mask([1]), other)


def test_overlap_of_nothing_is_refused():
    with pytest.raises(NeftError, match="has no neurons"):
        mask().overlap(mask([0]))


def test_a_mask_survives_its_file(tmp_path):
    path = tmp_path / "deep" / "m.safetensors"
    chosen = mask([0, 5], [3])
    chosen.save(path)
    read = NeuronMask.load(path)
    assert content(read) == content(chosen)
    assert read.indices[UP].dtype == torch.int64
    assert list(read.groups.items()) == list(GROUPS.items())
    assert (read.total_parameters, read.provenance) == (1000, chosen.provenance)
    assert read.source == str(path)
    assert [file.name for file in path.parent.iterdir()] == ["m.safetensors"]


def test_scores_survive_their_file_bit_by_bit(tmp_path):
    values = torch.tensor([0.0, 1e-300, 1 / 3, 2.0, 1e-17, 0.5], dtype=torch.float64)
    # the order of modules, which breaks ties, is not that of the alphabet
    scores = NeuronScores({UP: values, DOWN: values / 3}, GROUPS, 7, MADE)
    scores.save(tmp_path / "s.safetensors")
    read = NeuronScores.load(tmp_path / "s.safetensors")
    assert list(read.sensitivity) == list(read.groups) == [UP, DOWN]
    assert read.groups == GROUPS
    assert all(torch.equal(read.sensitivity[m], scores.sensitivity[m]) for m in GROUPS)
    assert read.sensitivity[UP].dtype == torch.float64
    assert (read.total_parameters, read.provenance) == (7, MADE)


def test_a_mask_without_neurons_survives_its_file(tmp_path):
    path = tmp_path / "none.safetensors"
    NeuronMask({}, {}, 0).save(path)
    read = NeuronMask.load(path)
    assert (read.neurons, read.parameters, read.percent, read.by_module()) == (0, 0, 0.0, {})


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    code = (
        "import sys; from neft_core.masks import NeuronMask;"
        "NeuronMask({}, {}, 1, {str(i): 'x' for i in range(20)}).save(sys.argv[1])"
    )
    paths = [tmp_path / "1", tmp_path / "2"]
    for path in paths:
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    mask([0]).save(path)

    def fails(*_):
        raise OSError(28, "disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(NeftError, match="No space left"):
        mask([1]).save(path)
    assert content(NeuronMask.load(path)) == {UP: [0]}
    assert len(list(tmp_path.iterdir())) == 1


def test_provenance_cannot_hide_the_file_s_own_keys(tmp_path):
    with pytest.raises(ValueError, match="reserved key 'kind'"):
        mask([0], kind="x").save(tmp_path / "m")


def test_bad_files_are_named_with_the_remedy(tmp_path):
    path = tmp_path / "m.safetensors"

    def refuses(text: str, kind=NeuronMask) -> None:
        with pytest.raises(NeftError, match=re.escape(f"{path}: {text}")) as caught:
            kind.load(path)
        assert "\n" not in str(caught.value)
        assert "; run 'neft stage " in str(caught.value)

    refuses("no such file; run 'neft stage select'")
    mask([0, 1], [2]).save(path)
    refuses("holds mask, scores expected; run 'neft stage score'", NeuronScores)
    path.write_bytes(path.read_bytes()[:-3])
    refuses("not a whole safetensors file (")
    path.write_bytes(b"")
    refuses("not a whole safetensors file (")
    path.write_text("{}" * 40)
    refuses("not a whole safetensors file (")
    save_file({"a": torch.zeros(1)}, path)
    refuses("holds other tensors, mask expected; run 'neft stage select'")
    whole = {"kind": "mask", "groups": "[]", "total_parameters": "1"}
    for damaged in (
        {"kind": "mask"},
        {**whole, "total_parameters": "many"},
        {**whole, "groups": "[{"},
        {**whole, "groups": '[{"module": "a", "colour": 1}]'},
    ):
        save_file({"a": torch.zeros(1)}, path, damaged)
        refuses("its metadata is damaged, or of another version; run 'neft stage select'")


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "en-fr.safetensors"
    mask([0], [1]).save(path)
    read = NeuronMask.load(path)
    fits = {f"{UP}.weight": (6, 4), f"{DOWN}.weight": (4, 6)}
    read.check()
    read.check(base_hash=MADE["base"], shapes=fits)
    text = f"{path}: made for base 3f2a3f2a3f2a..., this model is 91bc91bc91bc...; run 'neft stage"
    with pytest.raises(NeftError, match=re.escape(text)):
        read.check(base_hash="91bc" * 16)
    for wrong, found in (
        ({f"{UP}.weight": (6, 4)}, "4 weights in model.layers.0.mlp.down_proj, this model has no"),
        ({**fits, f"{UP}.weight": (4, 6)}, "this model has shape (4, 6) there; run"),
        ({f"{UP}.weight": (7, 4), f"{DOWN}.weight": (4, 7)}, "12 candidates in 2 modules, this"),
        (fits | {k.replace("0", "1"): v for k, v in fits.items()}, "this model has 24 in 4; run"),
    ):
        with pytest.raises(NeftError, match=re.escape(found)):
            read.check(shapes=wrong)


EXPERTS = "layers.0.mlp.experts.gate_up_proj"


def expert_mask(*neurons) -> NeuronMask:
    """Of two experts' up rows by turns with gate: candidates 1, 3, 5, 7."""
    groups = {EXPERTS: Group(EXPERTS, 0, 1, 4, 3, True, experts=2, width=4, step=2)}
    made = {"base": "0" * 64, "layout": "mlp", "model_type": "gpt_oss"}
    return NeuronMask({EXPERTS: torch.tensor(neurons)}, groups, 100, made)


def test_masks_of_experts_are_sets_too(tmp_path):
    a, b = expert_mask(1, 3, 7), expert_mask(3, 5)
    assert content(a | b) == {EXPERTS: [1, 3, 5, 7]}
    assert content(a - b) == {EXPERTS: [1, 7]}
    assert content(a & b) == {EXPERTS: [3]}
    assert a.overlap(b) == pytest.approx(1 / 3)
    assert (a.parameters, a.percent, a.by_module()) == (9, 9.0, {EXPERTS: Count(3, 4)})
    a.save(tmp_path / "m")
    read = NeuronMask.load(tmp_path / "m")
    assert (read.groups, content(read)) == (a.groups, content(a))


def test_masks_of_experts_are_checked():
    down = "layers.0.mlp.experts.down_proj"
    groups = {**expert_mask(1).groups, down: Group(down, 1, 0, 4, 3, True, experts=2, width=2)}
    chosen = replace(expert_mask(1), groups=groups)
    chosen.check(shapes={EXPERTS: (2, 3, 4), down: (2, 2, 3)})
    for shape in ((3, 3, 4), (2, 4, 3), (2, 3, 6), (3, 4)):
        with pytest.raises(NeftError, match=re.escape(f"{EXPERTS}, this model has shape {shape}")):
            chosen.check(shapes={EXPERTS: shape, down: (2, 2, 3)})


UNFIT = [
    ([3, 3], f"{UP} has indices that are not increasing in [0, 6); run 'neft stage select'"),
    ([4, 2], "not increasing in [0, 6)"),
    ([6], "not increasing in [0, 6)"),
    ([-1], "not increasing in [0, 6)"),
    (torch.tensor([1], dtype=torch.int32), f"{UP} has indices of shape (1,) and torch.int32; num"),
    (torch.tensor([1.0]), "indices of shape (1,) and torch.float32"),
    (torch.tensor([[1]]), "indices of shape (1, 1) and torch.int64"),
    (torch.tensor(1), "indices of shape () and torch.int64"),
]


@pytest.mark.parametrize(("indices", "text"), UNFIT)
def test_indices_that_are_not_those_of_candidates_are_refused(indices, text, tmp_path):
    wrong = {UP: torch.as_tensor(indices)}
    with pytest.raises(NeftError, match=re.escape(text)):
        replace(mask([0]), indices=wrong)
    path = tmp_path / "m"
    mask([0]).save(path)
    tampered(path, tensors=wrong)
    refuses_to_load(path, text)


def tampered(path, tensors=None, group=None, **metadata) -> None:
    """Change a file's tensors, the entry of its first group, or its metadata."""
    held, told = load_tensors(path, "")
    groups = json.loads(told["groups"])
    groups[0] |= group or {}
    told |= {"groups": json.dumps(groups), **metadata}
    save_file(held if tensors is None else tensors, path, told)


def refuses_to_load(path, text: str, kind=NeuronMask) -> None:
    with pytest.raises(NeftError, match=re.escape(text)) as caught:
        kind.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ({"axis": "0"}, f"Group(module='{UP}', axis='0', start=0"),
        ({"axis": 7}, "axis=7, start=0, count=6, length=4"),
        ({"axis": True}, "axis is 0 (rows) or 1 (columns)"),
        ({"count": 6.0}, "count=6.0"),
        ({"start": -1}, "start=-1"),
        ({"step": 0}, "step=0"),
        ({"experts": 4, "width": 6}, "the others are counts that fit each other; run 'neft stage"),
        ({"experts": 2}, "width=0"),
        ({"module": 3}, "module=3"),
        ({"module": [3]}, "module=[3]"),
        ({"module": DOWN}, "its metadata is damaged"),
    ],
)
def test_groups_that_no_weight_has_are_refused(group, text, tmp_path):
    mask([0]).save(tmp_path / "m")
    tampered(tmp_path / "m", group=group)
    refuses_to_load(tmp_path / "m", text)


@pytest.mark.parametrize("total", [-5, 0])
def test_a_total_that_no_model_has_is_refused(total, tmp_path):
    text = f"total_parameters: got {total}, not a model's number of parameters; run 'neft stage"
    with pytest.raises(NeftError, match=f"mask: {text}"):
        replace(mask([0]), total_parameters=total)
    mask([0]).save(tmp_path / "m")
    tampered(tmp_path / "m", total_parameters=str(total))
    refuses_to_load(tmp_path / "m", text)


def test_neurons_without_candidates_are_refused_not_dropped(tmp_path):
    path = tmp_path / "m"
    mask([0], [1]).save(path)
    only = json.dumps([vars(GROUPS[DOWN])])
    save_file(load_tensors(path, "")[0], path, load_tensors(path, "")[1] | {"groups": only})
    refuses_to_load(path, f"{UP} has indices, but no candidates in groups; run 'neft stage select'")


def test_scores_without_candidates_or_of_another_number_are_refused(tmp_path):
    path = tmp_path / "s"
    values = {UP: torch.zeros(6), DOWN: torch.zeros(6)}
    for tensors, text in (
        ({UP: torch.zeros(6)}, f"{DOWN} has no scores; run 'neft stage score'"),
        ({**values, UP: torch.zeros(5)}, f"{UP} has scores of shape (5,), but 6 candidates; run"),
        ({**values, UP + "|magnitude": torch.zeros(6, 1)}, f"{UP} has scores of shape (6, 1), but"),
        ({**values, "a": torch.zeros(6)}, "a has sensitivity, but no candidates in groups; run"),
    ):
        NeuronScores(values, GROUPS, 100).save(path)
        tampered(path, tensors=tensors)
        refuses_to_load(path, text, NeuronScores)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"indices": {UP: [0]}}, f"mask: indices: {UP}: got list; a tensor is needed"),
        ({"indices": {UP: np.array([0])}}, f"mask: indices: {UP}: got ndarray; a tensor is"),
        ({"indices": {"a": torch.tensor([0])}}, "mask: a has indices, but no candidates in"),
        ({"indices": [torch.tensor([0])]}, "mask: indices: got list; a dict is needed"),
        ({"groups": list(GROUPS.values())}, "mask: groups: got list; a dict is needed"),
        ({"groups": {UP: 3}}, f"mask: groups: {UP}: got int; its own Group is needed"),
        ({"groups": {UP: GROUPS[DOWN]}}, f"mask: groups: {UP}: got that of {DOWN}; its own"),
        ({"provenance": "lowest"}, "mask: provenance: got str; a dict is needed"),
        ({"total_parameters": "9"}, "mask: total_parameters: got '9', not a model's number of"),
    ],
)
def test_a_mask_of_wrong_types_is_refused_when_it_is_made(changes, text):
    with pytest.raises(NeftError, match=re.escape(text)) as caught:
        replace(mask([0]), **changes)
    assert "\n" not in str(caught.value)


def test_neurons_are_rows_or_columns():
    for axis in ("0", 7, None):
        with pytest.raises(NeftError, match=r"axis is 0 \(rows\) or 1 \(columns\)"):
            Group(UP, axis, 0, 6, 4)


def test_provenance_is_text_at_once(tmp_path):
    values = {UP: torch.zeros(6), DOWN: torch.zeros(6)}
    for made in (mask([0], steps=5), NeuronScores(values, GROUPS, 100, {**MADE, "steps": 5})):
        assert made.provenance["steps"] == "5"
        made.save(tmp_path / "m")
        assert type(made).load(tmp_path / "m").provenance == made.provenance


@pytest.mark.parametrize("other", [3, None, {UP: [0]}, NeuronScores({}, {}, 0)])
def test_a_mask_is_combined_with_masks_alone(other):
    for combine, sign in (
        (NeuronMask.__or__, "|"),
        (NeuronMask.__and__, "&"),
        (NeuronMask.__sub__, "-"),
        (NeuronMask.overlap, "&"),
    ):
        text = f"mask: '{sign}' got {type(other).__name__}; another NeuronMask is needed"
        with pytest.raises(NeftError, match=re.escape(text)):
            combine(mask([1]), other)


def test_a_file_from_before_experts_is_read(tmp_path):
    old = {"module": UP, "axis": 0, "start": 0, "count": 6, "length": 4, "transposed": False}
    metadata = {"kind": "mask", "groups": json.dumps([old]), "total_parameters": "9"}
    save_file({UP: torch.tensor([1])}, tmp_path / "m", metadata=metadata)
    assert NeuronMask.load(tmp_path / "m").groups == {UP: GROUPS[UP]}
