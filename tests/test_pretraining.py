"""The built model: what it is trained on, and that it comes out the same each time."""

import numpy as np
import torch

from neft_core import models, pretraining

TEXTS = [f"English: the {a} sees the {b}\nFrench: {b} {a}" for a in "abcdefgh" for b in "ijklmnop"]
SIZES = {"hidden": 16, "intermediate": 24, "layers": 2, "heads": 2, "context": 64}


def build(folder, **changes):
    folder.mkdir()
    options = {
        "vocabulary": 300, "sizes": SIZES, "epochs": 2, "batch_size": 16, "lr": 3e-3, "seed": 1,
        "resume": folder.parent / "resume", "mixed_precision": "no", "cpu": True,
    }  # fmt: skip
    pretraining.build(TEXTS, folder, **options | changes)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_texts_stand_between_their_tokens_and_are_cut():
    tokenizer = models.build_tokenizer(TEXTS, 300, 64)
    arrays = pretraining.encode_texts(["ab", "", "x" * 100], tokenizer, 8)
    rows = np.split(arrays["tokens"], arrays["offsets"][1:-1])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert rows[0].tolist() == [start, *tokenizer.encode("ab", add_special_tokens=False), end]
    assert rows[1].tolist() == [start, end]
    assert len(rows[2]) == 8
    assert rows[2][0] == start
    assert rows[2][-1] != end
    assert arrays["trained"].tolist() == [1] * len(arrays["tokens"])
    assert arrays["offsets"][-1] == len(arrays["tokens"])


def test_the_tokenizer_gives_back_every_text():
    tokenizer = models.build_tokenizer(TEXTS, 300, 64)
    for text in (*TEXTS, "漢字 हिन्दी é\n\t ", "</s>"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) <= 300
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_same_seed_same_bytes_another_seed_another_model(tmp_path):
    first, second = build(tmp_path / "a"), build(tmp_path / "b")
    assert first == second
    assert not (tmp_path / "resume").exists()
    other = build(tmp_path / "c", seed=2)
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] == other["tokenizer.json"]
    kind, parameters, context, _ = models.inspect(tmp_path / "a")
    model = models.load_model(tmp_path / "a", torch.float32)
    assert (kind, context) == ("llama", 64)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert model.config.tie_word_embeddings
