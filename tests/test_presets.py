"""The templates of known data sets, on a few rows in the form in which each data set comes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from neft_core import loading
from neft_core.config import yaml_text
from neft_core.encoding import load_encoded
from neft_core.files import read_json
from neft_core.rows import read_rows
from neft_core.stages import STAGES
from neft_core.workspace import Workspace

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRANSLATE = "Translate the following text from {} to {}.\n{}\n"


@pytest.fixture
def template(finished, tmp_path, monkeypatch):
    """A template's workspace, on a tiny model that takes texts of 2,048 tokens."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model = Path(shutil.copytree(finished.path("base"), tmp_path / "model"))
    config = read_json(model / "config.json") | {"max_position_embeddings": 2048}
    (model / "config.json").write_text(json.dumps(config))

    def make(name: str, *changes: tuple[str, str]) -> Workspace:
        ws = Workspace(tmp_path / name)
        ws.root.mkdir()
        text = (EXAMPLES / name / "params.yaml").read_text("utf-8")
        text = re.sub(r"model:\n(  .*\n)+", f"model: {{kind: local, path: {model}}}\n", text)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        ws.params_file.write_text(text)
        STAGES["base"](ws)
        return ws

    return make


def prepared(ws: Workspace, task: str) -> dict[str, list[tuple[str, str]]]:
    """What is asked and what is answered, in the rows that training and evaluation read."""
    for stage in ("corpus", "prepare"):
        STAGES[stage](ws, task)
    tokenizer, found = loading.base_card(ws)[1], {}
    for split in sorted(ws.path("prepared", task).glob("t*.safetensors")):
        arrays, _ = load_encoded(split)
        ends = arrays["offsets"].tolist()
        cuts = zip(ends, arrays["prompts"].tolist(), ends[1:], strict=False)
        found[split.stem] = [
            tuple(
                tokenizer.decode(arrays["tokens"][piece], skip_special_tokens=True)
                for piece in (slice(start, start + asked), slice(start + asked, end))
            )
            for start, asked, end in cuts
        ]
    return found


def as_on_the_hub(folder: Path, features, configs: dict[str, dict[str, list[dict]]]) -> None:
    """Parquet files, and a card that names them by configuration and split."""
    from datasets import Dataset

    card = []
    for config, splits in configs.items():
        parts = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        card.append({"config_name": config, "data_files": parts})
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            file = folder / config / f"{split}-00000-of-00001.parquet"
            Dataset.from_list(rows, features=features[config]).to_parquet(file)
    (folder / "README.md").write_text(f"---\n{yaml_text({'configs': card})}---\n# A card\n")


NEWS = {
    "en": [
        "Will rates rise?",
        "PARIS – “Growth” is back.",
        "It isn’t.",
        "Oil, at $10?",
        "So what?",
    ],
    "fr": ["Vont-ils monter ?", "PARIS – La croissance…", "Non.", "Du pétrole à 10 $ ?", "Et ?"],
    "zh": ["利率会上升吗？", "巴黎——“增长”回来了。", "并没有。", "油价10美元？", "那又怎样？"],
}


@pytest.mark.parametrize(
    ("name", "code", "language"),
    [
        ("llama-2-7b-news-commentary", "zh", "Chinese"),
        ("qwen3-0.6b-news-commentary", "fr", "French"),
    ],
)
def test_news_commentary_by_its_nested_columns(template, name, code, language):
    from datasets import Features, Translation, Value

    ws = template(name, ("dev: 500", "dev: 1"), ("test: 1000", "test: 1"))
    pairs = {
        f"{one}-{two}": [
            {"id": str(n), "translation": {one: a, two: b}}
            for n, (a, b) in enumerate(zip(NEWS[one], NEWS[two], strict=True))
        ]
        for one, two in (("en", "fr"), ("en", "zh"), ("fr", "zh"))
    }
    features = {
        pair: Features({"id": Value("string"), "translation": Translation(pair.split("-"))})
        for pair in pairs
    }
    folder = ws.root / "Helsinki-NLP/news_commentary"
    as_on_the_hub(folder, features, {pair: {"train": rows} for pair, rows in pairs.items()})
    found = prepared(ws, f"en-{code}")
    expected = [
        (TRANSLATE.format("English", language, source), target)
        for source, target in zip(NEWS["en"], NEWS[code], strict=True)
    ]
    assert {split: len(rows) for split, rows in found.items()} == {"test": 1, "train": 3}
    for rows in found.values():
        assert rows == [row for row in expected if row in rows], "in the order of the file"
    dev = read_rows(ws.path("corpus", f"en-{code}", "dev.jsonl"))
    shown = {source for rows in found.values() for source, _ in rows}
    shown |= {TRANSLATE.format("English", language, row["source"]) for row in dev}
    assert shown == {source for source, _ in expected}


def test_xnli_by_language(template):
    from datasets import ClassLabel, Features, Value

    ws = template("xnli-qwen3-0.6b")
    labels = ["entailment", "neutral", "contradiction"]
    texts = {
        "en": ("Well , “it's late”, she told him .", "She {} him ."),
        "fr": ("Bon , « il est tard », lui dit-elle .", "Elle l'a {} ."),
        "de": ("„Es ist spät“, sagte sie ihm.", "Sie hat ihn {} ."),
        "all": ("all", "all {}"),
    }
    rows = {
        code: {
            split: [
                {"premise": f"{split}: {premise}", "hypothesis": hypothesis.format(n), "label": n}
                for n in (2, 0, 1)
            ]
            for split in ("train", "test", "validation")
        }
        for code, (premise, hypothesis) in texts.items()
    }
    text = {"premise": Value("string"), "hypothesis": Value("string")}
    features = dict.fromkeys(rows, Features({**text, "label": ClassLabel(names=labels)}))
    as_on_the_hub(ws.root / "facebook/xnli", features, rows)
    for task, splits in (("en", ["test", "train"]), ("fr", ["test"]), ("de", ["test"])):
        premise, hypothesis = texts[task]
        found = prepared(ws, task)
        assert list(found) == splits
        for split in splits:
            assert found[split] == [
                (f"Premise: {split}: {premise}\nHypothesis: {hypothesis.format(n)}\nLabel:",
                 f" {labels[n]}")
                for n in (2, 0, 1)
            ]  # fmt: skip
    assert [row["label"] for row in read_rows(ws.path("corpus", "en", "dev.jsonl"))] == [
        "contradiction", "entailment", "neutral",
    ]  # fmt: skip


def test_crosssum_by_its_archives(template):
    ws = template("crosssum-qwen3-0.6b")
    (ws.root / "data").mkdir()
    long = "long " * 300  # a token for each letter, or nearly so
    for language, text in (("english", "News {}."), ("french", "Été {}."), ("hindi", "समाचार {}।")):
        for split, count in (("train", 130), ("val", 3), ("test", 2)):
            rows = [
                {"source_url": f"https://www.bbc.com/{language}/{n}",
                 "target_url": f"https://www.bbc.com/zhongwen/simp/{n}",
                 "summary": f"{split}摘要{n}",
                 "text": text.format(f"{split} {n}") + long * (n == 1)}
                for n in range(count)
            ]  # fmt: skip
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            name = f"{language}-chinese_simplified_{split}.jsonl"
            (ws.root / "data" / name).write_text("".join(lines), "utf-8")
    for task, text, kept in (("en-zh", "News {}.", 129), ("fr-zh", "Été {}.", 100),
                             ("hi-zh", "समाचार {}।", 100)):  # fmt: skip
        found = prepared(ws, task)
        expected = {
            split: [
                (f"Summarize the following text in Chinese.\n{text.format(f'{split} {n}')}\n",
                 f"{split}摘要{n}")
                for n in range(count) if n != 1
            ]
            for split, count in (("train", 130), ("test", 2))
        }  # fmt: skip
        assert found["test"] == expected["test"]
        assert len(found["train"]) == kept
        assert found["train"] == [row for row in expected["train"] if row in found["train"]]
        stats = read_json(ws.path("prepared", task, "stats.json"))
        assert [stats[split]["dropped"] for split in ("train", "dev", "test")] == [1, 1, 1]
        assert stats["dev"]["kept"] == 2


LINES = {
    "eng": ['"Mice like it," he said.', "It's 10 °C.", "“Quoted” and done."],
    "fra": ["« Les souris aiment ça. »", "Il fait 10 °C.", "Fini."],
    "hin": ["उन्होंने कहा।", "10 डिग्री है।", "समाप्त।"],
    "zho_simpl": ["他说：“老鼠喜欢它。”", "现在10摄氏度。", "完成。"],
    "mri": ["Ka mea ia.", "10 °C tēnei.", "Kua mutu."],
    "bos": ["„Miševi to vole“, rekao je.", "10 °C je.", "Gotovo."],
}  # fmt: skip


def test_flores_and_lego_mt_by_the_commands_of_the_readme(template):
    """One file a language, line beside line; `paste` of the README makes pairs of them."""
    ws = template("flores-qwen3-0.6b")
    files = ws.root / "flores101_dataset"
    for split, mark in (("dev", "d"), ("devtest", "t")):
        (files / split).mkdir(parents=True)
        for code, lines in LINES.items():
            text = "".join(f"{line} {mark}\n" for line in lines)
            (files / split / f"{code}.{split}").write_text(text, "utf-8")
    for short, code in (("en", "eng"), ("zh", "zho_simpl"), ("mi", "mri"), ("bs", "bos")):
        # Between two articles of News Commentary is a line without text.
        articles = ["".join(f"{line} {number}\n" for line in LINES[code]) for number in range(2)]
        (ws.root / f"train.{short}").write_text("\n".join(articles), "utf-8")
    readme = (EXAMPLES / "flores-qwen3-0.6b/README.md").read_text("utf-8")
    commands = re.search(r"```bash\n(mkdir .*?)```", readme, re.DOTALL)[1]
    names = {"English": "eng", "Chinese": "zho_simpl", "French": "fra", "Hindi": "hin",
             "Maori": "mri", "Bosnian": "bos"}  # fmt: skip
    for task, section in ws.params().tasks.items():
        source, target = section.format.source_language, section.format.target_language
        one, two = names[source], names[target]
        said = (
            commands if section.trains else re.sub(r"(?m)^paste (?!.*test\.tsv).*\n", "", commands)
        )
        for old, new in (
            ("data/en-zh", f"data/{task}"), ("/eng.", f"/{one}."), ("/zho_simpl.", f"/{two}."),
            ("train.zh", f"train.{task[3:]}"),
        ):  # fmt: skip
            assert old in said or not section.trains
            said = said.replace(old, new)
        subprocess.run(["bash", "-euc", said], cwd=ws.root, check=True)
        pairs = list(zip(LINES[one], LINES[two], strict=True))
        found = prepared(ws, task)
        asked = {"test": [(f"{a} t", f"{b} t") for a, b in pairs]}
        if section.trains:
            asked["train"] = [(f"{a} {n}", f"{b} {n}") for n in range(2) for a, b in pairs]
            dev = read_rows(ws.path("corpus", task, "dev.jsonl"))
            assert [(row["source"], row["target"]) for row in dev] == [
                (f"{a} d", f"{b} d") for a, b in pairs
            ]
        assert found == {
            split: [(TRANSLATE.format(source, target, a), b) for a, b in rows]
            for split, rows in asked.items()
        }
