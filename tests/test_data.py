import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neft_core.data import read_hub, read_local
from neft_core.errors import NeftError

ROWS = [{"source": "Hi.", "target": "Salut !"}, {"source": 'One, "two"', "target": "Un, « deux »"}]
NUMBERS = {"source": 0, "target": 1}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(params=["jsonl", "json", "csv", "tsv", "parquet"])
def file(request, tmp_path):
    """The two rows in each format, with a third column."""
    path = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        return parquet(
            path,
            {
                "target": [r["target"] for r in ROWS],
                "source": [r["source"] for r in ROWS],
                "n": [1, 2],
            },
        )
    return write(
        path,
        {
            "csv": 'n,target,source\r\n1,Salut !,Hi.\r\n2,"Un, « deux »","One, ""two"""\r\n',
            "tsv": 'n\ttarget\tsource\n1\tSalut !\tHi.\n\n2\tUn, « deux »\tOne, "two"\n',
        }.get(
            request.param, "\ufeff" + "\n".join(json.dumps({"n": 1, **r}) for r in ROWS) + "\n\n"
        ),
    )


def test_every_format_gives_the_same_rows(file):
    assert read_local(file) == ROWS
    assert read_local(file, {"source": "target", "target": "source"})[0]["source"] == "Salut !"
    assert read_local(file, limit=1) == ROWS[:1]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_numbers_read_files_without_header(tmp_path, suffix):
    mark = "," if suffix == "csv" else "\t"
    path = write(tmp_path / f"x.{suffix}", f"Hi.{mark}Salut !{mark}CC-BY\nNo.{mark}Non.\n")
    assert read_local(path, NUMBERS) == [
        {"source": "Hi.", "target": "Salut !"},
        {"source": "No.", "target": "Non."},
    ]
    with pytest.raises(NeftError, match=rf"x\.{suffix}:2: no column 2 .* this line has 2"):
        read_local(path, {"source": 0, "target": 2})


def test_quotes_are_text_in_tsv_and_quoting_in_csv(tmp_path):
    path = write(tmp_path / "x.tsv", '"Open\tOuvrez\n"a"\t""b\n')
    assert [row["source"] for row in read_local(path, NUMBERS)] == ['"Open', '"a"']
    path = write(tmp_path / "x.csv", '"two\nlines",a\nb,\n')
    with pytest.raises(NeftError, match=r"x\.csv:3: 'target' is empty"):
        read_local(path, NUMBERS)
    path = write(tmp_path / "x.csv", 'a,b\n"never closed,c\n')
    with pytest.raises(NeftError, match=r"x\.csv:2: invalid CSV"):
        read_local(path, NUMBERS)


def test_a_long_document_is_read_from_csv(tmp_path):
    text = "word " * 30_000 + "end"
    path = write(tmp_path / "x.csv", f"source,target\n{text},b\n")
    assert read_local(path) == [{"source": text, "target": "b"}]


def test_line_separators_inside_a_text_end_no_line(tmp_path):
    text = "a\u2028b\x85c"
    path = write(tmp_path / "x.tsv", f"{text}\td\n")
    assert read_local(path, NUMBERS)[0]["source"] == text
    path = write(
        tmp_path / "x.jsonl", json.dumps({"source": text, "target": "d"}, ensure_ascii=False)
    )
    assert read_local(path)[0]["source"] == text


def test_dotted_names_reach_nested_columns(tmp_path):
    nested = {"id": "1", "translation": {"en": "Hi.", "fr": "Salut !"}}
    columns = {"source": "translation.en", "target": "translation.fr"}
    path = write(tmp_path / "x.jsonl", json.dumps(nested))
    assert read_local(path, columns) == ROWS[:1]
    path = parquet(tmp_path / "x.parquet", {"translation": [nested["translation"]]})
    assert read_local(path, columns) == ROWS[:1]
    with pytest.raises(
        NeftError,
        match=r"x\.parquet row 1: no column 'translation\.fra'; there are 'translation\.en', "
        r"'translation\.fr' \(nearest: 'translation\.fr'\)",
    ):
        read_local(path, columns | {"target": "translation.fra"})
    path = write(tmp_path / "x.jsonl", json.dumps({"a.b": "flat", "a": {"c": "deep"}}))
    assert read_local(path, {"source": "a.b", "target": "a.c"}) == [
        {"source": "flat", "target": "deep"}
    ]


def test_references_and_messages_are_read(tmp_path):
    row = {"source": "Hi.", "target": "Salut !", "references": ["Salut !", "Coucou !"]}
    assert read_local(write(tmp_path / "x.jsonl", json.dumps(row))) == [row]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    named = {"conversation": [turn | {"id": 1} for turn in turns]}
    path = write(tmp_path / "x.jsonl", json.dumps(named))
    assert read_local(path, {"messages": "conversation"}) == [{"messages": turns}]


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ("hello", "'messages' is no list of turns"),
        ([], "'messages' is no list of turns"),
        (["hello"], r"messages\[0\] is no object"),
        (
            [{"role": "human", "content": "x"}],
            r"messages\[0\]\.role is 'human'; 'system' or 'user'",
        ),
        ([{"role": "user", "content": "x"}], "messages' has no assistant turn"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
            r"messages\[1\]\.role is 'user'; 'assistant' is expected here",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}],
            r"messages\[1\]\.content' is empty",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant"}],
            r"messages\[1\]\.content' is missing",
        ),
    ],
)
def test_malformed_turns_are_refused_with_their_line(tmp_path, turns, text):
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    lines = [json.dumps({"messages": one}) for one in (good, turns)]
    with pytest.raises(NeftError, match=rf"x\.jsonl:2: '?{text}"):
        read_local(write(tmp_path / "x.jsonl", "\n".join(lines)))


GOOD = b'{"source": "a", "target": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "columns", "text"),
    [
        ("x.jsonl", None, None, r"x\.jsonl: no such file"),
        ("x.parquet", None, None, r"x\.parquet: no such file"),
        ("x.jsonl", b"", None, "the file is empty"),
        ("x.parquet", b"", None, "the file is empty"),
        ("x.jsonl", b"\n \n", None, r"x\.jsonl: no rows"),
        ("x.tsv", b"source\ttarget\n", None, r"x\.tsv: no rows"),
        ("x.xlsx", GOOD, None, r"suffix '\.xlsx'; one of \.jsonl, .*, \.parquet"),
        ("x", GOOD, None, "unknown suffix ''"),
        (
            "x.jsonl",
            GOOD + b'{"source": "a"}\n',
            None,
            r"x\.jsonl:2: no column 'target'; there are 'source'",
        ),
        ("x.jsonl", GOOD + b'{"source": "a", "target": ""}', None, r":2: 'target' is empty"),
        ("x.jsonl", b'\n{"source": "a", "target": null}', None, r":2: 'target' is missing"),
        ("x.jsonl", b'{"source": 5, "target": "b"}', None, r":1: 'source' is of type int"),
        (
            "x.jsonl",
            b'{"source": "\\ud800", "target": "b"}',
            None,
            ":1: 'source' holds half a surr",
        ),
        (
            "x.jsonl",
            b'{"source": "a", "target": "b", "references": []}',
            None,
            ":1: 'references' is no list",
        ),
        (
            "x.jsonl",
            b'{"sorce": "a", "target": "b"}',
            None,
            r"no column 'source'; .*\(nearest: 'sorce'\)",
        ),
        ("x.csv", b"source,target\na,b\nc\n", None, r"x\.csv:3: 'target' is missing"),
        ("x.csv", b"source,target\na,b\nc,\n", None, r"x\.csv:3: 'target' is empty"),
        (
            "x.csv",
            b"source,target\na,b, c\n",
            None,
            r":2: 3 fields, the header has 2; quote what holds",
        ),
        (
            "x.tsv",
            b"source\ttarget\na\tb\tc\n",
            None,
            r"x\.tsv:2: 3 fields, the header has 2; take tabs",
        ),
        ("x.csv", b"source,source\na,b\n", None, r"x\.csv:1: column 'source' stands twice"),
        (
            "x.jsonl",
            GOOD + b'{"source": "\xe9t\xe9", "target": "b"}',
            None,
            r":2: invalid UTF-8 \(byte 0xe9 at position 13",
        ),
        ("x.tsv", b"a\tb\n\xff\tc\n", NUMBERS, r"x\.tsv:2: invalid UTF-8"),
        ("x.csv", b"a,b\nc,d\n\xff,e\n", NUMBERS, r"x\.csv:3: invalid UTF-8"),
        (
            "x.jsonl",
            GOOD + b'{"source": "a", "target"\n',
            None,
            r":2: invalid JSON \(Expecting ':'",
        ),
        ("x.jsonl", GOOD + b"17\n", None, ":2: a JSON int"),
        pytest.param(
            "x.jsonl",
            b'{"n": ' + b"1" * 5000 + b"}",
            None,
            ":1: .* of too many digits",
            id="digits",
        ),
        ("x.json", b'[{"source": "a", "target": "b"}]', None, ":1: a JSON array; JSON lines"),
        ("x.jsonl", b"[" * 9 + b"\n", None, ":1: a JSON array"),
        ("x.jsonl", b'{"a":' * 100000 + b"\n", None, ":1: JSON nested too deeply"),
        ("x.parquet", b"PAR1 and no more", None, "not a whole Parquet file"),
        ("x.jsonl", GOOD, {"source": "source"}, r"columns has \['source'\]; 'source' and 'target'"),
        ("x.jsonl", GOOD, {"source": "a", "target": "b", "n": "c"}, "columns has"),
        ("x.tsv", GOOD, {"source": 0, "target": "b"}, "columns mixes numbers and names"),
        ("x.jsonl", GOOD, NUMBERS, "columns are numbers"),
    ],
)
def test_faults_name_file_and_line(tmp_path, name, content, columns, text):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(NeftError, match=text) as caught:
        read_local(path, columns)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = parquet(tmp_path / "x.parquet", {"source": ["a"] * 99, "target": ["b"] * 99})
    assert len(read_local(path)) == 99
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(NeftError, match="not a whole Parquet file"):
        read_local(path)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "pairs"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 5), ("test", 2)):
        records = [{"id": i, "translation": {"en": f"e{i}", "fr": f"f{i}"}} for i in range(count)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        write(folder / "data" / f"{split}.jsonl", text)
    return folder


HUB = {"source": "translation.en", "target": "translation.fr"}


def test_a_folder_in_the_hubs_layout_is_read(hub_folder, capfd):
    rows = read_hub(str(hub_folder), revision="main", split="train", columns=HUB)
    assert rows == [{"source": f"e{i}", "target": f"f{i}"} for i in range(5)]
    assert len(read_hub(str(hub_folder), revision=None, split="test", columns=HUB)) == 2
    assert read_hub(str(hub_folder), revision=None, split="train", columns=HUB, limit=3) == rows[:3]
    assert read_hub(str(hub_folder), revision=None, split="train[1:3]", columns=HUB) == rows[1:3]
    assert capfd.readouterr() == ("", "")


def test_reading_leaves_the_librarys_settings_alone(hub_folder):
    import datasets

    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.INFO)
    read_hub(str(hub_folder), revision=None, split="test", columns=HUB)
    assert not datasets.are_progress_bars_disabled()
    assert logger.level == logging.INFO
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"split": "valid"}, r"cannot be read, config None, split 'valid' \(.*train.*\)"),
        ({"config": "fr-de"}, "cannot be read, config 'fr-de'"),
        (
            {"columns": {"source": "translation.en", "target": "translation.de"}},
            r"train row 0: no column 'translation\.de'; there are 'translation\.en'",
        ),
        ({"columns": {"source": "en", "target": "fr"}}, "no column 'en'"),
        ({"columns": {"source": "en"}}, "columns has"),
        ({"name": "./nowhere"}, "no such directory"),
        ({"name": "~nobody-here/nowhere"}, "no such directory"),
    ],
)
def test_hub_faults_are_one_line(hub_folder, change, text):
    given = {"name": str(hub_folder), "revision": None, "split": "train", "columns": HUB} | change
    with pytest.raises(NeftError, match=text) as caught:
        read_hub(given.pop("name"), **given)
    assert str(caught.value).startswith("hub data set '")
    assert "\n" not in str(caught.value)


def test_code_in_a_data_set_is_never_run(tmp_path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    ran = tmp_path / "ran"
    write(folder / "scripted.py", f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(NeftError, match="cannot be read"):
        read_hub(str(folder), revision=None, split="train", columns=HUB)
    assert not ran.exists()


def test_offline_the_hub_is_one_line_that_says_what_to_do(tmp_path):
    code = (
        "from neft_core.data import read_hub\n"
        "from neft_core.errors import NeftError\n"
        "try:\n"
        "    read_hub('x/y', revision='main', split='train', columns={'messages': 'm'})\n"
        "except NeftError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout == (
        "hub data set 'x/y': cannot be reached (offline) and is not in the local cache; download "
        "it once with network, or use source kind 'local'\n"
    )


def test_real_files_are_read(shared):
    data = shared / "data"
    test = read_local(data / "tatoeba-en-fr" / "test.jsonl")
    assert len(test) == 1000
    assert all(row["target"] in row["references"] for row in test)
    chinese = read_local(data / "tatoeba_cmn_eng_2019" / "cmn.txt", NUMBERS)
    hindi = read_local(data / "tatoeba_hin_eng" / "hin.txt", NUMBERS)
    assert (len(chinese), len(hindi)) == (21116, 3117)
    assert chinese[0] == {"source": "Hi.", "target": "嗨。"}


def test_a_changed_folder_is_read_anew(hub_folder):
    assert len(read_hub(str(hub_folder), revision=None, split="test", columns=HUB)) == 2
    file = hub_folder / "data" / "test.jsonl"
    file.write_text(file.read_text().splitlines()[0].replace("e0", "new") + "\n")
    rows = read_hub(str(hub_folder), revision=None, split="test", columns=HUB)
    assert rows == [{"source": "new", "target": "f0"}]


NLI = '{{"p": "A.", "h": "B.", "l": {}}}\n'
NLI_COLUMNS = {"premise": "p", "hypothesis": "h", "label": "l"}


@pytest.mark.parametrize(
    ("label", "labels", "read"),
    [
        ("0", None, "entailment"),
        ("2", None, "contradiction"),
        ('"1"', None, "neutral"),
        ('" contradiction"', None, "contradiction"),
        ('"E"', {"entailment": "E", "neutral": "N", "contradiction": "C"}, "entailment"),
        ("0", {"entailment": 2, "neutral": 1, "contradiction": 0}, "contradiction"),
    ],
)
def test_labels_are_names_or_what_stands_for_them(tmp_path, label, labels, read):
    path = write(tmp_path / "x.jsonl", NLI.format(label))
    rows = read_local(path, NLI_COLUMNS, task="nli", labels=labels)
    assert rows == [{"premise": "A.", "hypothesis": "B.", "label": read}]


@pytest.mark.parametrize(
    ("label", "labels", "text"),
    [
        ("3", None, r"x\.jsonl:2: the label is 3; entailment \(0\), neutral \(1\), contradiction"),
        ("-1", None, r"x\.jsonl:2: the label is -1; entailment"),
        ('"maybe"', None, r"x\.jsonl:2: the label is 'maybe'; entailment"),
        ('"entailment"', {"entailment": "E", "neutral": "N", "contradiction": "C"},
         r"the label is 'entailment'; entailment \(E\)"),
        ("null", None, r"x\.jsonl:2: the label is None"),
    ],
)  # fmt: skip
def test_a_label_outside_the_three_is_refused_with_its_line(tmp_path, label, labels, text):
    path = write(
        tmp_path / "x.jsonl", NLI.format(1 if labels is None else '"E"') + NLI.format(label)
    )
    with pytest.raises(NeftError, match=text) as caught:
        read_local(path, NLI_COLUMNS, task="nli", labels=labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_nli_is_read_from_tables(tmp_path, suffix):
    tab = "," if suffix == "csv" else "\t"
    lines = [("premise", "hypothesis", "label"), ("A.", "B.", "2")]
    path = write(tmp_path / f"x.{suffix}", "".join(tab.join(line) + "\n" for line in lines))
    assert read_local(path, task="nli")[0]["label"] == "contradiction"


def test_an_empty_summary_is_refused_by_the_name_of_its_column(tmp_path):
    path = write(
        tmp_path / "x.jsonl", '{"text": "a", "summary": "b"}\n{"text": "c", "summary": " "}\n'
    )
    columns = {"source": "text", "target": "summary"}
    with pytest.raises(NeftError, match=r"x\.jsonl:2: 'summary' is empty; text is needed"):
        read_local(path, columns, task="summarisation")


def test_sentences_are_joined_and_several_summaries_are_references(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        '{"source": ["One.", " ", "Two. "], "target": ["first", "second"]}\n'
        '{"source": ["Three."], "target": ["only"]}\n',
    )
    assert read_local(path, task="summarisation") == [
        {"source": "One. Two.", "target": "first", "references": ["first", "second"]},
        {"source": "Three.", "target": "only"},
    ]
    for source, found in (('["", " "]', "empty"), ('["One.", 2]', "of type list")):
        path = write(tmp_path / "y.jsonl", f'{{"source": {source}, "target": ["a"]}}\n')
        with pytest.raises(NeftError, match=rf"y\.jsonl:1: 'source' is {found}"):
            read_local(path, task="summarisation")


def test_rows_of_another_kind_are_refused_by_what_is_needed(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"source": "a", "target": "b"}\n')
    with pytest.raises(NeftError, match=r"x\.jsonl:1: no column 'premise'; there are 'source'"):
        read_local(path, task="nli")
    with pytest.raises(NeftError, match=r"columns has .*; 'premise' and 'hypothesis' and 'label'"):
        read_local(path, {"source": "source", "target": "target"}, task="nli")


def test_scitldr_is_read(shared):
    rows = read_local(shared / "data" / "scitldr" / "test.jsonl", task="summarisation")
    assert len(rows) == 618
    assert all("references" not in row or row["references"][0] == row["target"] for row in rows)
    assert max(len(row.get("references", [])) for row in rows) > 2
