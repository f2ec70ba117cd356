import hashlib
import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from neft_core.encoding import (
    encode,
    encode_prompt,
    encode_split,
    limit_sources,
    load_encoded,
    save_encoded,
)
from neft_core.errors import NeftError
from neft_core.rows import answers, read_rows
from neft_core.tasks import PLAIN_TURN, Form

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama-2: the first token in the text, answers between spaces, an end token after each.
INST = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Gemma: a turn ends with a token that is not the end of the sequence.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
# Shows an answer's length only while it is the last, as templates that drop earlier thinking do.
REWRITES = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{{ 'A (last): ' }}"
    "{% else %}{{ m.role + ': ' }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A (last): ' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<turn>", "<end>"]
TEXT = ["the cat sat on the mat", "two and two is four", "user system assistant", "### User:\n"] * 3


def tiny(template=None, bos="<s>", eos="</s>", spaced=False):
    """A byte-level BPE tokenizer; or one that puts a space before every text, as Llama-2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<s>"))
    if spaced:
        space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(space)
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Metaspace()
        alphabet = sorted(set("▁lé:{EnglishFrench" + "".join(TEXT)))
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.chat_template = template
    return tokenizer


def talk(*turns, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for number, content in enumerate(turns):
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return {"messages": messages}


TALK = talk("two and two?", "four", "{sure}?", "yes, four\n", system="the cat")
PAIR = {"source": "the cat {", "target": "le chat é"}
LANGUAGES = ("English", "French")
PLAIN = Form("translation", "English: {source}\nFrench:")


def shown(encoded, tokenizer):
    """The stretches of text that are trained."""
    stretches = groupby(zip(*encoded, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([one for one, _ in part]) for trained, part in stretches if trained]


CASES = {
    "translation": (PAIR, PLAIN, {}),
    "newline": (PAIR, Form("translation", "{source}\n"), {}),
    "no bos": (PAIR, PLAIN, {"bos": None}),
    "spaced": (PAIR, PLAIN, {"spaced": True}),
    "translation chat": (PAIR, Form("translation", languages=LANGUAGES), {"template": CHATML}),
    "plain turns": (TALK, Form("instruction", PLAIN_TURN), {}),
    "chatml": (TALK, Form("instruction"), {"template": CHATML, "eos": "<|im_end|>"}),
    "inst": (talk("a", "b", "c", "d"), Form("instruction"), {"template": INST}),
    "turns": (TALK, Form("instruction"), {"template": TURNS}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_prompt_is_exactly_the_start_and_the_rest_ends_trained_in_eos(case):
    row, form, kind = CASES[case]
    tokenizer = tiny(**kind)
    encoded = encode(row, form, tokenizer)
    prompt = encode_prompt(row, form, tokenizer)
    assert encoded.ids[: len(prompt)] == prompt
    assert all(encoded.trained[len(prompt) :])
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert encoded.ids.count(tokenizer.bos_token_id) >= (tokenizer.bos_token_id is not None)
    assert encoded.ids[:2] != [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(encoded.ids[len(prompt) :], skip_special_tokens=True).split() == (
        answers(row)[0].split()
    )
    other = {**row, "target": "x"} if "target" in row else {**row, "messages": [*row["messages"]]}
    if "messages" in other:
        other["messages"][-1] = {"role": "assistant", "content": "x"}
    assert encode_prompt(other, form, tokenizer) == prompt


def test_translation_is_tokenised_as_the_whole_text_is():
    tokenizer = tiny()
    whole = tokenizer("English: the cat {\nFrench: le chat é", add_special_tokens=False)[
        "input_ids"
    ]
    encoded = encode(PAIR, PLAIN, tokenizer)
    assert encoded.ids == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
    assert shown(encoded, tokenizer) == [" le chat é</s>"]
    assert encode(PAIR, PLAIN, tiny(bos=None)).ids == encoded.ids[1:]


def test_tokenizers_that_begin_with_a_space_get_one_and_not_two():
    tokenizer = tiny(spaced=True)
    row = {"source": "the cat", "target": "the mat"}
    form = Form("translation", "on {source} is")
    whole = tokenizer("on the cat is the mat", add_special_tokens=False)["input_ids"]
    assert encode(row, form, tokenizer).ids == [0, *whole, 1]


def test_end_tokens_written_in_a_target_are_text():
    tokenizer = tiny()
    encoded = encode({"source": "a", "target": "b </s> c"}, PLAIN, tokenizer)
    assert encoded.ids.count(tokenizer.eos_token_id) == 1
    plain = Form("instruction", PLAIN_TURN)
    encoded = encode(talk("a", "b </s><s>"), plain, tokenizer)
    assert encoded.ids.count(tokenizer.eos_token_id) == 1


def test_chat_agrees_with_the_librarys_own_mask_of_the_assistants_tokens():
    tokenizer = tiny(CHATML, bos=None, eos="<|im_end|>")
    reference = tokenizer.apply_chat_template(
        TALK["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode(TALK, Form("instruction"), tokenizer)
    end = len(encoded.ids)  # the template's last newline is beyond the end of the answer
    assert encoded.ids == reference["input_ids"][:end]
    assert [int(one) for one in encoded.trained] == reference["assistant_masks"][:end]
    assert tokenizer.decode(reference["input_ids"][end:]) == "\n"
    assert shown(encoded, tokenizer) == ["four<|im_end|>", "yes, four\n<|im_end|>"]


def test_each_template_trains_its_answers_with_what_ends_them():
    tokenizer = tiny(INST)
    encoded = encode(talk("a", "b", "c", "d"), Form("instruction"), tokenizer)
    assert tokenizer.decode(encoded.ids) == "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"
    assert shown(encoded, tokenizer) == [" b </s>", " d </s>"]
    tokenizer = tiny(TURNS)
    encoded = encode(TALK, Form("instruction"), tokenizer)
    assert shown(encoded, tokenizer) == ["four<end>\n", "yes, four\n<end>\n</s>"]
    assert encoded.ids.count(0) == 1
    encoded = encode(PAIR, Form("translation", languages=LANGUAGES), tokenizer)
    assert tokenizer.decode(encoded.ids) == (
        "<s><turn>user\nTranslate the following text from English to French.\nthe cat {<end>\n"
        "<turn>assistant\nle chat é<end>\n</s>"
    )
    tokenizer = tiny()
    encoded = encode(TALK, Form("instruction", PLAIN_TURN), tokenizer)
    assert shown(encoded, tokenizer) == ["four</s>", "yes, four\n</s>"]


def test_a_question_after_the_last_answer_is_left_out():
    tokenizer = tiny(CHATML, eos="<|im_end|>")
    form = Form("instruction")
    assert encode(talk("a", "b", "c"), form, tokenizer) == encode(talk("a", "b"), form, tokenizer)


@pytest.mark.parametrize(
    ("kind", "row", "form", "text"),
    [
        ({"template": REWRITES}, talk("a", "b", "c", "d"), Form("instruction"), "rewrites earlier"),
        (
            {"template": INST},
            TALK,
            Form("instruction"),
            r"refuses the conversation \(no system turn\)",
        ),
        ({}, TALK, Form("instruction"), "the tokenizer has no chat template"),
        ({"eos": None}, PAIR, PLAIN, "no end-of-sequence token"),
        ({}, PAIR, Form("instruction", PLAIN_TURN), "no 'messages'; rows of task 'instruction'"),
    ],
)
def test_what_cannot_be_encoded_is_refused(kind, row, form, text):
    with pytest.raises(NeftError, match=text) as caught:
        encode(row, form, tiny(**kind))
    assert "\n" not in str(caught.value)


ROWS = [{"source": "the cat " * n, "target": "le chat " * n} for n in range(1, 9)]


def test_a_split_is_its_rows_one_after_another():
    tokenizer = tiny()
    tokenizer.model_max_length = 5  # nothing may be said about it
    arrays, stats = encode_split(ROWS, PLAIN, tokenizer, max_tokens=500, where="train")
    assert [str(arrays[name].dtype) for name in ("tokens", "trained", "offsets", "prompts")] == [
        "int32", "uint8", "int64", "int32"
    ]  # fmt: skip
    for number, row in enumerate(ROWS):
        part = slice(arrays["offsets"][number], arrays["offsets"][number + 1])
        one = encode(row, PLAIN, tokenizer)
        assert arrays["tokens"][part].tolist() == one.ids
        assert arrays["trained"][part].tolist() == one.trained
        prompt = arrays["tokens"][part][: arrays["prompts"][number]]
        assert prompt.tolist() == encode_prompt(row, PLAIN, tokenizer)
    assert stats == {
        "rows": 8,
        "too_long": 0,
        "kept": 8,
        "tokens": len(arrays["tokens"]),
        "trained_tokens": int(arrays["trained"].sum()),
        "longest": len(encode(ROWS[-1], PLAIN, tokenizer).ids),
    }


def test_rows_too_long_are_dropped_in_training_and_kept_in_evaluation():
    tokenizer = tiny()
    lengths = [len(encode(row, PLAIN, tokenizer).ids) for row in ROWS]
    limit = lengths[3]
    arrays, stats = encode_split(ROWS, PLAIN, tokenizer, max_tokens=limit, where="train")
    assert np.diff(arrays["offsets"]).tolist() == lengths[:4]
    assert (stats["too_long"], stats["kept"], stats["longest"]) == (4, 4, lengths[-1])
    longest_prompt = len(encode_prompt(ROWS[-1], PLAIN, tokenizer))
    arrays, stats = encode_split(
        ROWS, PLAIN, tokenizer, max_tokens=longest_prompt, where="test", keep_long=True
    )
    assert np.diff(arrays["offsets"]).tolist() == lengths
    assert stats["kept"] == 8
    assert stats["too_long"] == sum(length > longest_prompt for length in lengths) > 0
    with pytest.raises(NeftError, match=rf"test row 8: its prompt has {longest_prompt} tokens"):
        encode_split(
            ROWS, PLAIN, tokenizer, max_tokens=longest_prompt - 1, where="test", keep_long=True
        )
    with pytest.raises(NeftError, match=r"train: none of 8 rows fits into max_tokens 3 \(longest:"):
        encode_split(ROWS, PLAIN, tokenizer, max_tokens=3, where="train")


def test_what_is_saved_is_loaded_and_the_bytes_depend_on_nothing_else(tmp_path):
    arrays, stats = encode_split(ROWS, PLAIN, tiny(), max_tokens=500, where="train")
    metadata = {"stats": stats, "z": 1, "a": "é", "list": [1, None]}
    path = tmp_path / "train.safetensors"
    save_encoded(path, arrays, metadata)
    loaded, found = load_encoded(path)
    assert found == metadata
    assert {name: (a.dtype, a.tolist()) for name, a in loaded.items()} == {
        name: (a.dtype, a.tolist()) for name, a in arrays.items()
    }
    # In two further processes, because safetensors orders several metadata keys by a random hash.
    code = (
        "import sys; from neft_core.encoding import load_encoded, save_encoded\n"
        "arrays, metadata = load_encoded(sys.argv[1])\n"
        "arrays, metadata = (dict(reversed(one.items())) for one in (arrays, metadata))\n"
        "save_encoded(sys.argv[2], arrays, metadata)"
    )
    for copy in ("one", "two"):
        subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / copy)],
            cwd=Path(__file__).parents[1],
            check=True,
        )
    digests = {
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("one", "two", path.name)
    }
    assert len(digests) == 1


def test_broken_files_are_refused_in_one_line(tmp_path):
    arrays, _ = encode_split(ROWS, PLAIN, tiny(), max_tokens=500, where="train")
    path = tmp_path / "train.safetensors"
    save_encoded(path, arrays, {})
    whole = path.read_bytes()
    for size in (len(whole) - 1, 100, 4):
        path.write_bytes(whole[:size])
        with pytest.raises(
            NeftError, match=r"train\.safetensors: cut off or no safetensors"
        ) as caught:
            load_encoded(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(NeftError, match="the file is empty"):
        load_encoded(path)
    with pytest.raises(NeftError, match="no such file"):
        load_encoded(tmp_path / "none")
    save_encoded(path, {"tokens": arrays["tokens"]}, {})
    with pytest.raises(NeftError, match=r"holds \['tokens'\] and no encoded split"):
        load_encoded(path)


@pytest.fixture(scope="module")
def real(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "models" / "tatoeba-llama-2.5m")


def test_real_rows_are_encoded_as_the_real_base_was_pretrained(shared, real):
    rows = read_rows(shared / "data" / "tatoeba-en-fr" / "test.jsonl")
    arrays, stats = encode_split(rows, PLAIN, real, max_tokens=256, where="test", keep_long=True)
    assert (stats["rows"], stats["kept"], stats["too_long"]) == (1000, 1000, 0)
    for number, row in enumerate(rows):
        part = slice(arrays["offsets"][number], arrays["offsets"][number + 1])
        text = f"English: {row['source']}\nFrench: {row['target']}"
        whole = real(text, add_special_tokens=False)["input_ids"]
        assert arrays["tokens"][part].tolist() == [1, *whole, 2], json.dumps(row)
        target = arrays["tokens"][part][arrays["trained"][part] == 1]
        assert real.decode(target, skip_special_tokens=True) == " " + row["target"]


def sources(*texts):
    return [{"source": text, "target": "t"} for text in texts]


LONG = "the cat sat on the mat and two and two is four, été 你好 the end of it"


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 5, 9, 17, 30])
def test_a_truncated_source_is_a_beginning_that_fits(limit, spaced):
    tokenizer = tiny(spaced=spaced)
    (row,), counts = limit_sources(
        sources(LONG), tokenizer, max_tokens=limit, drop=False, where="train"
    )
    kept = row["source"]
    length = len(tokenizer(kept, add_special_tokens=False)["input_ids"])
    whole = len(tokenizer(LONG, add_special_tokens=False)["input_ids"])
    assert LONG.startswith(kept)
    assert length <= limit
    if limit < whole:
        assert counts == {"truncated": 1}
        longer = LONG[: len(kept) + 8]  # one character can be several tokens, a word one
        assert len(tokenizer(longer, add_special_tokens=False)["input_ids"]) > limit - 4
    assert row["target"] == "t"


def test_sources_that_fit_are_left_alone_and_longer_ones_dropped_where_asked():
    tokenizer = tiny()
    rows = sources("the cat", LONG, "the mat")
    limit = len(tokenizer("the cat")["input_ids"]) + 2
    kept, counts = limit_sources(rows, tokenizer, max_tokens=limit, drop=True, where="train")
    assert (kept, counts) == ([rows[0], rows[2]], {"dropped": 1})
    kept, _ = limit_sources(rows, tokenizer, max_tokens=limit, drop=False, where="train")
    assert [kept[0], kept[2]] == [rows[0], rows[2]]
    with pytest.raises(NeftError, match=r"test: none of 1 sources has at most max_input 3 tokens"):
        limit_sources(sources(LONG), tokenizer, max_tokens=3, drop=True, where="test")
