"""Files as people have them give the rows that `datasets` reads; damaged ones are refused with the place."""

import bz2
import gzip
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from rewarded_lines.config import DataSpec, PromptSpec
from rewarded_lines.data.dataset_formats import read_prompts
from rewarded_lines.data.row_files import read_local
from rewarded_lines.data.rows import read_rows
from rewarded_lines.errors import UserError
from rewarded_lines.training.recipe_options import DataOptions

ROWS = [{"prompt": f"Wörld {number}?\n", "id": number} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=2)
DOCUMENTS = {
    "lines.json": LINES,
    "lines.ndjson": LINES,
    "windows.jsonl": "\ufeff" + LINES.replace("\n", "\r\n\r\n"),
    "array.json": ARRAY,
    "one-line.json": json.dumps(ROWS),
    "array.jsonl": " \n" + ARRAY,
    "data.json": json.dumps({"version": "1.1", "data": ROWS}),
    "rows.json": json.dumps({"rows": ROWS}, indent=1),
    "one-after-another.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
}
CSV = 'prompt,id\n"a, ""b""\nc",1\nd,2\n'
PACK = {
    "gz": gzip.compress, "bz2": bz2.compress,
    "zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}  # fmt: skip


def prompts_of(rows):
    return [row["prompt"] for row in rows]


def rows_of(path, split="train"):
    return [row for _, row in read_local(path, split)]


def fault(path, split="train"):
    with pytest.raises(UserError) as caught:
        rows_of(path, split)
    (problem,) = caught.value.problems
    return problem


def stream(*tables):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_form_of_json_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_text(DOCUMENTS[name], encoding="utf-8")
    assert rows_of(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("rows.jsonl", "gz"), ("rows.json", "gz"), ("rows.jsonl", "zst"), ("rows.csv", "zst"), ("rows.tsv", "bz2")],
)
def test_packed_texts_in_one_part_or_several_give_their_rows(tmp_path, name, suffix):
    text = {"jsonl": LINES, "json": ARRAY, "csv": CSV, "tsv": CSV.replace(",", "\t")}[name[5:]].encode()
    parts = [text[:20], text[20:]]
    (tmp_path / f"{name}.{suffix}").write_bytes(b"".join(map(PACK[suffix], parts)))
    (tmp_path / name).write_bytes(text)
    made = rows_of(tmp_path / f"{name}.{suffix}")
    assert made == rows_of(tmp_path / name) and len(made) == (2 if name[5:] in ("csv", "tsv") else 3)


@pytest.mark.parametrize(
    ("builder", "name", "content", "more"),
    [
        ("json", "a.json", ARRAY, {}),
        ("json", "a.jsonl.gz", LINES, {}),
        ("json", "a.json", json.dumps({"data": ROWS}), {"field": "data"}),
        ("json", "a.json", '["Why?", "Who?"]', {}),
        ("csv", "a.csv.gz", CSV, {}),
        ("csv", "a.tsv", CSV.replace(",", "\t"), {"sep": "\t"}),
    ],
)
def test_rows_are_those_that_datasets_reads(tmp_path, builder, name, content, more):
    pack = PACK.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(content.encode()))
    wanted = datasets.load_dataset(
        builder, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache"), **more
    )
    # A CSV file has texts only.
    made = [{key: str(value) for key, value in row.items()} for row in rows_of(tmp_path / name)]
    assert made == [{key: str(value) for key, value in row.items()} for row in wanted]


def test_what_save_to_disk_wrote_is_read_as_load_from_disk_reads_it(tmp_path):
    rows = [{"prompt": str(number), "extra": {"a": number} if number % 2 else {"b": "x"}} for number in range(7)]
    saved = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    both = datasets.DatasetDict(train=saved.select(range(4)), test=saved.select([5, 2]))
    both.save_to_disk(tmp_path / "both")
    saved.to_parquet(tmp_path / "one.parquet")
    assert rows_of(tmp_path / "one") == list(datasets.load_from_disk(tmp_path / "one")) == rows
    assert rows_of(tmp_path / "one.parquet") == rows
    for split in ("train", "test"):
        assert rows_of(tmp_path / "both", split) == list(datasets.load_from_disk(tmp_path / "both")[split])
    problem = fault(tmp_path / "both", "validation")
    assert problem.what == "no split `validation`" and problem.expected == "one of train, test"
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    assert fault(tmp_path / "one").got == "data-00001-of-00003.arrow"
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{}]}')
    assert fault(tmp_path / "one").what == "not as `save_to_disk` writes it"


def test_an_arrow_file_and_a_stream_are_read(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "turn": [{"x": 1, "y": None}, {"x": None, "y": "b"}]})
    (tmp_path / "stream.arrow").write_bytes(stream(table, table))
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    rows = [{"prompt": "a", "turn": {"x": 1}}, {"prompt": "b", "turn": {"y": "b"}}]
    assert rows_of(tmp_path / "file.arrow") == rows and rows_of(tmp_path / "stream.arrow") == rows * 2


@pytest.mark.parametrize(
    "files",
    [
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
        ["data/train_prefs-00000-of-00001.jsonl", "data/train_sft-00000-of-00001.jsonl"],
        ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "README.md", ".cache/c.jsonl"],
        ["my-train.jsonl", "my.dev.jsonl", "state-of-the-art.md"],
        ["a.jsonl", "b.jsonl", "config.json"],
    ],
    ids=["shards", "shards of other splits", "folders", "words", "no splits"],
)
def test_the_files_of_a_split_are_those_that_datasets_finds(tmp_path, files):
    for number, name in enumerate(files):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": str(number)}))
    found = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    for split, wanted in found.items():
        assert rows_of(tmp_path / "set", split) == list(wanted)


def test_a_pattern_and_a_folder_are_sorted_as_people_count_and_reported(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"part-{number}.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "%d"}\n' % number))
    (tmp_path / "notes.md").write_text("")
    for name in ("part-*.gz", "."):
        told = []
        spec = PromptSpec(file=name)
        assert prompts_of(read_prompts(spec, tmp_path, told.append)) == ["1", "2", "10"]
        assert told[0] == f"rows of {name}: 3 files, from part-1.jsonl.gz to part-10.jsonl.gz"
    options = DataOptions(train_file=str(tmp_path / "**" / "part-1*"))
    assert prompts_of(read_prompts(options.train())) == ["1", "10"]
    problem = fault(tmp_path / "parts-*.gz")
    assert problem.what == "no file fits the pattern" and "holds notes.md, part-1.jsonl.gz" in problem.got


def test_brackets_in_the_name_of_a_folder_or_file_are_no_pattern(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "a[2].json").write_text(LINES)
    assert rows_of(folder / "a[2].json") == rows_of(folder / "*.json") == rows_of(folder) == ROWS


@pytest.mark.parametrize(
    ("files", "what", "got", "remedy"),
    [
        (["a.jsonl", "a.csv"], "files of several types", ".csv, .jsonl", "a.csv"),
        (["a.jsonl", "a.jsonl.gz"], "files of several types", ".jsonl, .jsonl.gz", "a.jsonl"),
        (["x/test.jsonl", "y/test.jsonl"], "files in several folders", "x, y", "x/test.jsonl"),
        (["train.jsonl", "notes.jsonl"], "no split `test`", "", "`split:`"),
        (["test.txt"], "no file in the folder can be read", "test.txt", ""),
    ],
)
def test_a_folder_that_may_mix_data_is_refused(tmp_path, files, what, got, remedy):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    problem = fault(tmp_path, "test")
    assert problem.where == str(tmp_path) and problem.what == what
    assert problem.got == got and remedy in problem.remedy


TABLE = pa.table({"prompt": ["a" * 100] * 50})
STREAM = stream(TABLE, TABLE)
BETWEEN = len(stream(TABLE)) - 8
RANDOM = random.Random(0)
LONG = "".join(json.dumps({"prompt": RANDOM.randbytes(300).hex()}) + "\n" for _ in range(300)).encode()


@pytest.mark.parametrize(
    ("name", "content", "place", "what"),
    [
        ("a.jsonl.gz", gzip.compress(LONG)[:-20], "line 299", "cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(LONG)[:-9000], "line ", "cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(LONG)[:-8] + b"01234567", "line 300", "cannot be read to its end"),
        ("a.jsonl.gz", b"", "line 0", "cannot be read to its end"),
        ("a.jsonl.gz", LONG, "line 0", "cannot be read to its end"),
        ("a.jsonl.zst", PACK["zst"](LONG) + b"more", "line ", "cannot be read to its end"),
        ("a.csv.bz2", bz2.compress(CSV.encode())[:-4], "line ", "cannot be read to its end"),
        ("a.jsonl.zst", PACK["zst"](LONG)[:-20], "line ", "cannot be read to its end"),
        ("a.json", ARRAY[:-20].encode(), "line 11", "not JSON"),
        ("a.json", (ARRAY + "]").encode(), "line 14", "not JSON"),
        ("a.json", LINES[:-9].encode(), "line 3", "not JSON"),
        ("a.json", b'[{"prompt": "a"}, ["b"]]', "row 1", "not a JSON object"),
        ("a.json", b"5", "row 0", "not a JSON object"),
        ("a.arrow", STREAM[:BETWEEN], "", "not readable as Arrow"),
        ("a.arrow", STREAM + STREAM, "", "not readable as Arrow"),
        ("a.arrow", STREAM[:-30], "", "not readable as Arrow"),
        ("a.arrow", b"", "", "not readable as Arrow"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path, name, content, place, what):
    (tmp_path / name).write_bytes(content)
    problem = fault(tmp_path / name)
    assert what in problem.what and problem.where.startswith(str(tmp_path / name)) and place in problem.where


def test_a_damaged_file_among_good_ones_gives_no_rows(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(LINES if name != "b" else LINES[:-5])
    with pytest.raises(UserError, match=r"b\.jsonl, line 3"):
        read_rows(DataSpec(file="."), [("prompt",)], tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_lines_are_read_in_little_memory(tmp_path, name):
    text = json.dumps({"prompt": "x" * 4000}).encode() + b"\n"
    (tmp_path / name).write_bytes(PACK.get(name[8:], bytes)(text * 3_000))
    tracemalloc.start()
    count = sum(1 for _ in read_local(tmp_path / name, "train"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3_000 and peak < 2_000_000


@pytest.mark.parametrize(
    ("name", "content", "made"),
    [
        ("a b.txt", "Why?\nWho?", "a b.txt.jsonl"),
        ("tables.json", json.dumps({"train": ROWS, "test": ROWS}), "tables.jsonl"),
        ("lists.json", json.dumps({"prompt": ["Why?", "Who?"], "id": [1, 2]}, indent=1), "lists.jsonl"),
        ("columns.json", json.dumps({"prompt": {"0": "Why?", "1": "Who?"}, "id": {"0": 1, "1": 2}}), "columns.jsonl"),
    ],
)
def test_the_command_of_a_refusal_makes_a_file_that_is_read(tmp_path, name, content, made):
    (tmp_path / name).write_text(content)
    command = fault(tmp_path / name).remedy
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, env=environment)
    prompts = [row["prompt"] for row in rows_of(tmp_path / made)]
    assert prompts == ([row["prompt"] for row in ROWS] if name == "tables.json" else ["Why?", "Who?"])


def test_archives_are_refused_with_the_command_that_unpacks_them(tmp_path):
    import tarfile

    (tmp_path / "rows.jsonl").write_text(LINES)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "rows.jsonl", "rows.jsonl")
    command = fault(tmp_path / "a.tar.gz").remedy.removeprefix("python")
    subprocess.run(sys.executable + command, shell=True, check=True)
    assert rows_of(tmp_path / "a.tar.gz.unpacked") == ROWS


def test_one_splits_files_are_no_other_split_and_slices_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train_prefs-00000-of-00001.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="train_prefs"):
        read_prompts(DataSpec(file=str(tmp_path / "data"), split="test"))
    for split in ("train[:80%]", "train+test"):
        with pytest.raises(UserError, match="slices and sums of splits are for data sets of the Hub"):
            read_prompts(DataSpec(file=str(tmp_path / "data"), split=split))
