import os

import pytest

from neft_core.errors import NeftError
from neft_core.rows import answers, read_rows, replacing, write_rows

ROWS = [
    {"target": "Ça va ?", "source": "How is it\u2028going?"},
    {
        "source": "你好",
        "target": 'a\tb\\n"c"',
        "references": ["x", "y"],
        "construction": "greeting",
    },
    {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
]


def test_what_is_written_is_read_back_with_every_key(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, ROWS)
    assert read_rows(path) == ROWS
    assert "你好" in path.read_text("utf-8")


def test_same_rows_give_same_bytes_whatever_the_order_of_keys(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_rows(one, ROWS)
    write_rows(two, [dict(reversed(row.items())) for row in ROWS])
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("missing", [1, 5, 20])
def test_a_cut_off_file_is_refused_with_its_line(tmp_path, missing):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(NeftError, match=r"rows\.jsonl:3: the file is cut off here"):
        read_rows(path)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(NeftError, match="no such file"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(NeftError, match="is empty"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    before = path.read_bytes()

    def breaks():
        yield ROWS[0]
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_rows(path, breaks())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_system_refusal_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(NeftError, match=r"rows\.jsonl: can.t be written \("),
        replacing(tmp_path / "file" / "rows.jsonl"),
    ):
        pass
    with (
        pytest.raises(NeftError, match="No space left on device"),
        replacing(tmp_path / "rows.jsonl"),
    ):
        raise OSError(28, os.strerror(28))


def test_answers_start_with_the_one_to_learn_and_name_each_once():
    assert answers({"source": "s", "target": "b", "references": ["a", "b"]}) == ["b", "a"]
    turns = [("user", "q"), ("assistant", "x"), ("user", "p"), ("assistant", "y"), ("user", "?")]
    assert answers({"messages": [{"role": r, "content": c} for r, c in turns]}) == ["y"]
