"""Rows with roles from every kind of source; each fault names its place, the columns and the remedy."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rewarded_lines.config import DataSpec
from rewarded_lines.data.rows import COLUMNS, read_rows, rows_hash
from rewarded_lines.errors import UserError

PAIR = ("prompt", "completion")
LAYOUTS = [("messages",), PAIR, ("text",)]
ROWS = [{"prompt": "Where?", "completion": ' "There", naïvely –\nand so on.', "id": "1"}]
ROWS += [{"prompt": "", "completion": "b", "id": "2"}, {"prompt": "c", "completion": " d ", "id": "3"}]
PAIRS = [{role: row[role] for role in PAIR} for row in ROWS]
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
FUNCTIONS = """\
def dict_of(row):
    return {"prompt": row["q"], "completion": row["q"].upper()}


def list_of(row):
    return [{"prompt": row["q"], "completion": end} for end in ("!", "?")]


def none_of(row):
    return None if row["q"] == "a" else dict_of(row)


def raises(row):
    return {"prompt": row["z"]}


def text_of(row):
    return row["q"]


def texts_of(row):
    return [row["q"]]
"""


def save(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder, data, layouts=LAYOUTS, name="data.jsonl", **spec):
    save(folder / name, data)
    return roles_of(read_rows(DataSpec(file=name, **spec), layouts, folder))


def roles_of(rows):
    return [{role: value for role, value in row.items() if role != COLUMNS} for row in rows]


def fault(folder, *data, layouts=LAYOUTS, content=None, name="data.jsonl", **spec):
    """Return the one problem of rows, or of a file's content."""
    if content is None:
        save(folder / name, data)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_rows(DataSpec(file=name, **spec), layouts, folder)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_kind_of_file_gives_the_same_rows_in_order_with_their_roles_only(tmp_path, suffix):
    assert read(tmp_path, ROWS, name=f"data{suffix}") == PAIRS


def test_a_large_parquet_file_is_read_in_order(tmp_path):
    rows = [{"text": str(number)} for number in range(70_000)]
    assert read(tmp_path, rows, name="data.parquet") == rows


def test_blank_lines_are_no_rows_but_are_counted(tmp_path):
    problem = fault(tmp_path, content=b'{"text": "a"}\n\n \n{"tex": "b"}\n')
    assert problem.where == f"{tmp_path / 'data.jsonl'}, line 4"


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"prompt": "post", "completion": "summary"}, {"post": "a", "summary": "b"}),
        ({"prompt": "info.post", "completion": "info.best.text"}, {"info": {"post": "a", "best": {"text": "b"}}}),
        ({"prompt": "completion", "completion": "prompt"}, {"prompt": "b", "completion": "a"}),
        ({"completion": "prompt2"}, {"prompt": "a", "prompt2": "b", "completion": "c"}),
        ({"prompt": "info.post"}, {"info.post": "a", "completion": "b"}),
    ],
    ids=["names", "nested", "swapped", "one", "a dot in the name"],
)
@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_columns_may_have_other_names(tmp_path, name, columns, row):
    assert read(tmp_path, [row], name=name, columns=columns) == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"messages": CHAT, "text": "a", "prompt": "b", "completion": "c"}, ["messages"]),
        ({"text": "a", "completion": "c", "prompt": "b"}, ["prompt", "completion"]),
        ({"text": "a", "prompt": "b"}, ["text"]),
    ],
)
def test_the_first_layout_that_the_columns_allow_is_taken(tmp_path, row, roles):
    (made,) = read(tmp_path, [row])
    assert made == {role: row[role] for role in roles} and list(made) == roles


def test_every_row_has_the_layout_of_the_first_one(tmp_path):
    problem = fault(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "c", "text": "d"})
    assert problem.where.endswith("data.jsonl, line 2") and problem.what == "no text in column `completion`"
    assert problem.got == "nothing; columns prompt, text"


@pytest.mark.parametrize(
    ("function", "expected"),
    [("dict_of", ["aA", "bB"]), ("list_of", ["a!", "a?", "b!", "b?"]), ("none_of", ["bB"])],
)
def test_a_row_function_makes_a_row_or_several_or_none(tmp_path, function, expected):
    (tmp_path / "rows.py").write_text(FUNCTIONS)
    made = read(tmp_path, [{"q": "a"}, {"q": "b"}], rows=f"rows.py:{function}")
    assert [row["prompt"] + row["completion"] for row in made] == expected


def test_columns_are_those_of_the_row_functions_rows(tmp_path):
    (tmp_path / "rows.py").write_text(FUNCTIONS)
    columns = {"prompt": "completion", "completion": "prompt"}
    assert read(tmp_path, [{"q": "a"}], rows="rows.py:dict_of", columns=columns) == [{"prompt": "A", "completion": "a"}]


@pytest.mark.parametrize(
    ("function", "what", "got"),
    [
        ("raises", "the row function raised KeyError: 'z'", '{"q": "b"}'),
        ("text_of", "the row function returned no row", ""),
        ("texts_of", "the row function returned no row", ""),
    ],
)
def test_a_row_function_that_fails_is_shown_its_row(tmp_path, function, what, got):
    (tmp_path / "rows.py").write_text(FUNCTIONS)
    problem = fault(tmp_path, {"q": "b"}, rows=f"rows.py:{function}")
    assert (problem.where, problem.what) == (f"{tmp_path / 'data.jsonl'}, line 1", what)
    assert problem.got == got or not got


def test_a_row_function_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "rows.py").write_text(FUNCTIONS)
    assert fault(tmp_path, {"q": "b"}, rows="rows.py:dict_off").remedy == "did you mean `dict_of`?"


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_turns_are_kept_whole(tmp_path, name):
    rows = [{"messages": [{**turn, "weight": 1} for turn in CHAT]}]
    assert read(tmp_path, rows, name=name) == rows
    rows = [{"prompt": CHAT[:1], "completion": CHAT[1:]}]
    assert read(tmp_path, rows, name=name) == rows


@pytest.mark.parametrize("value", [None, 5, [], ["a"], [{"role": 5}], [{"content": "a"}], CHAT[0]])
def test_what_is_neither_text_nor_turns_is_shown(tmp_path, value):
    problem = fault(tmp_path, {"text": "a", "id": 1}, {"text": value, "id": 2})
    assert problem.where.endswith(", line 2") and problem.what == "no text in column `text`"
    assert problem.expected.endswith("columns messages, or prompt + completion, or text")
    assert problem.got == f"{'nothing' if value is None else repr(value)}; columns text, id"


@pytest.mark.parametrize(
    ("row", "columns", "what", "got"),
    [
        ({"post": "a", "tldr": "b"}, {}, "the columns do not make a training row", "columns post, tldr"),
        ({}, {}, "the columns do not make a training row", "columns none"),
        (
            dict.fromkeys("abcdefghijklmno", ""),
            {},
            "the columns do",
            "columns a, b, c, d, e, f, g, h, i, j, k, l and 3 more",
        ),
        ({"post": "a"}, {"text": "posts"}, "no column `posts` (declared for text)", "columns post"),
        ({"a": {"b": "c"}}, {"text": "a.d"}, "no column `a.d` (declared for text)", "columns a"),
        ({"a": "b"}, {"text": "a.d"}, "no column `a.d` (declared for text)", "columns a"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, row, columns, what, got):
    problem = fault(tmp_path, row, columns=columns)
    assert problem.where == f"{tmp_path / 'data.jsonl'}, line 1"
    assert problem.what.startswith(what) and problem.got.startswith(got)
    assert columns or "`columns: {ROLE: COLUMN}`" in problem.remedy and "row_function" in problem.remedy


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet"])
def test_no_rows_are_a_fault(tmp_path, name):
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    problem = fault(tmp_path, content=(tmp_path / name).read_bytes() if name.endswith(".parquet") else b"", name=name)
    assert (problem.where, problem.what) == (str(tmp_path / name), "there are no rows")


def test_no_rows_are_a_fault_when_a_function_leaves_all_out(tmp_path):
    (tmp_path / "rows.py").write_text(FUNCTIONS)
    assert fault(tmp_path, {"q": "a"}, rows="rows.py:none_of").what == "there are no rows"


def test_a_limit_counts_rows_that_are_made_and_reads_no_further(tmp_path):
    (tmp_path / "rows.py").write_text(FUNCTIONS)
    rows = [{"q": "a"}, {"q": "b"}, {"q": "a"}, {"q": "c"}, {"no": "q"}]
    assert [row["prompt"] for row in read(tmp_path, rows, rows="rows.py:none_of", limit=2)] == ["b", "c"]
    assert len(read(tmp_path, rows, rows="rows.py:list_of", limit=3)) == 3
    assert len(read(tmp_path, ROWS, limit=99)) == 3


def test_the_hash_tells_content_and_order_apart_and_nothing_else():
    row, turns = {"prompt": "a", "completion": "b"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}
    assert rows_hash([row]) == rows_hash([{"completion": "b", "prompt": "a"}]) and len(rows_hash([row])) == 64
    others = [[], [row], [turns], [row, turns], [turns, row], [row, row], [{"prompt": "ab", "completion": ""}]]
    others += [[{"prompt": '[{"role": "user", "content": "Hello"}]', "completion": "b"}], [{"prompt": "\ud800"}]]
    assert len({rows_hash(one) for one in others}) == len(others)


@pytest.mark.parametrize(
    ("name", "content", "where", "what", "got"),
    [
        ("data.jsonl", b'{"text": "a"}\n{"text": "b"\n', ", line 2", "not JSON", "line 2 column 1"),
        ("data.jsonl", b'[["a"]]\n', ", row 0", "not a JSON object", "list"),
        ("data.jsonl", b"[" * 100_000, ", line 1", "not JSON", ""),
        ("data.json", b'[\n{"text": "a"}\n', ", line 3", "not JSON", ""),
        ("data.jsonl", b'{"text": "caf\xe9"}\n', "", "not UTF-8 text", "0xe9"),
        ("data.csv", b"text\ncaf\xe9\n", "", "not UTF-8 text", "0xe9"),
        ("data.csv", b"text,id\na,1\nb\n", ", line 3", "another number of fields", "'text': 'b', 'id': None"),
        ("data.csv", b"text,id\na,1,2\n", ", line 2", "another number of fields", "['2']"),
        ("data.csv", b'text,id\na,1\n"b,2\n', ", line 3", "not readable as CSV", "unexpected end of data"),
        ("data.csv", b'text,id\n"a"b,2\n', ", line 2", "not readable as CSV", "expected after"),
        ("data.parquet", b"", "", "not readable as Parquet", "0 bytes"),
        ("data.parquet", b"PAR1", "", "not readable as Parquet", ""),
    ],
)
def test_files_that_cannot_be_read_are_named_with_the_line(tmp_path, name, content, where, what, got):
    problem = fault(tmp_path, content=content, name=name)
    assert problem.where == f"{tmp_path / name}{where}" and problem.what.startswith(what) and got in problem.got


@pytest.mark.parametrize("name", ["data.txt", "data.parquet.gz", "data.jsonl.lz4", "data"])
def test_other_kinds_of_files_are_not_read(tmp_path, name):
    problem = fault(tmp_path, content=b'{"text": "a"}\n', name=name)
    assert (problem.where, problem.what) == (str(tmp_path / name), "not a file type that can be read")
    assert problem.expected.startswith(".jsonl, .json, .ndjson, .csv, .tsv, .parquet, .arrow; text also with .gz, ")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_parquet_file_cut_short_is_a_fault(tmp_path, share):
    save(tmp_path / "data.parquet", ROWS)
    whole = (tmp_path / "data.parquet").read_bytes()
    problem = fault(tmp_path, content=whole[: int(share * len(whole))], name="data.parquet")
    assert (problem.where, problem.what) == (str(tmp_path / "data.parquet"), "not readable as Parquet")


def test_parquet_text_that_is_not_utf8_is_a_fault(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    pq.write_table(pa.table({"text": text}), tmp_path / "data.parquet")
    content = (tmp_path / "data.parquet").read_bytes()
    assert fault(tmp_path, content=content, name="data.parquet").what == "not UTF-8 text"


@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
def test_two_columns_of_one_name_are_a_fault(tmp_path, name):
    content = b"text,text\na,b\n"
    if name.endswith(".parquet"):
        pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / name)
        content = (tmp_path / name).read_bytes()
    assert "text" in str(fault(tmp_path, content=content, name=name))


def test_a_file_that_is_not_there_is_named(tmp_path):
    name = "absent.jsonl"
    with pytest.raises(UserError) as caught:
        read_rows(DataSpec(file=name), LAYOUTS, tmp_path)
    (problem,) = caught.value.problems
    assert (problem.where, problem.what) == (str(tmp_path / name), "no such file")
    assert "a folder of files, or a pattern" in problem.expected and "rewarded-lines demo" in problem.remedy


@pytest.mark.parametrize("sources", [{}, {"file": "a.csv", "dataset": "a/b"}, {"file": "a.csv", "system": "Be brief."}])
def test_a_source_is_a_file_or_a_data_set_and_a_systems_turn_is_one_of_a_chat(sources):
    with pytest.raises(ValueError, match="either `file:` or `dataset:`|set `chat: true` too"):
        DataSpec(**sources)


def test_a_data_set_without_a_network_is_one_message():
    with pytest.raises(UserError) as caught:
        read_rows(DataSpec(dataset="organisation/name", subset="small"), LAYOUTS)
    (problem,) = caught.value.problems
    assert problem.where == "data set organisation/name, subset small, split train"
    assert problem.what == "the data set cannot be reached" and "HF_HUB_OFFLINE" in problem.remedy
    assert "OfflineModeIsEnabled" in problem.got and "\n" not in problem.got


def test_a_data_set_that_fails_otherwise_is_not_blamed_on_the_network(monkeypatch):
    def load(*_, **__):
        raise ValueError('Unknown split "tset".\nShould be one of [train].')

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError) as caught:
        read_rows(DataSpec(dataset="organisation/name", split="tset"), LAYOUTS)
    (problem,) = caught.value.problems
    assert problem.where == "data set organisation/name, split tset" and "train[:1000]" in problem.remedy
    assert problem.what == "the data set cannot be loaded"
    assert problem.got == 'ValueError: Unknown split "tset". Should be one of [train].'


@pytest.mark.parametrize(("revision", "key"), [("v2", "name"), (None, "name"), ("refs/convert/parquet", "data_dir")])
def test_a_data_set_is_asked_for_by_subset_split_and_revision(monkeypatch, revision, key):
    """The Hub's own conversions keep each subset in a folder, and no card names it."""
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return [*ROWS, {"prompt": 1, "completion": ""}]

    monkeypatch.setattr("datasets.load_dataset", load)
    spec = DataSpec(dataset="organisation/name", subset="small", split="test", revision=revision, limit=3)
    assert roles_of(read_rows(spec, LAYOUTS)) == PAIRS
    assert asked == [(("organisation/name",), {key: "small", "split": "test", "revision": revision})]
    with pytest.raises(UserError, match="data set organisation/name, split test, row 3: no text in column `prompt`"):
        read_rows(spec.model_copy(update={"limit": None}), LAYOUTS)
