"""Forged files that once passed or would do harm: each is refused with its message, and does no harm."""

import json
import os
import pickle
import resource
import subprocess
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from command import COMMAND, ENVIRONMENT
from mutations import pack, unpack
from plain_checkpoints import INDEX, SINGLE, check_formula, read_plain, save_family, save_plain
from safetensors.numpy import save_file
from tiny_models import snapshot

from rewarded_lines.checkpoints.hashing import weights_hash

ARGS = ("merge", "--base", "sft", "--policy", "first", "--policy", "second", "--out", "out")
NAMES = ("sft", "first", "second")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base and two policies in the working directory."""
    monkeypatch.chdir(save_family(tmp_path / "place"))
    return tmp_path / "place"


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """The same models in two files each."""
    monkeypatch.chdir(save_family(tmp_path / "place", shards=2))
    return tmp_path / "place"


@pytest.fixture
def refused(cli):
    """Run a merge that must be refused with one message and change no file."""

    def run(*args):
        before = snapshot(Path())
        answer = cli(*(args or ARGS))
        assert answer.code == 1 and answer.out == "" and snapshot(Path()) == before, answer
        assert all(char.isprintable() or char == "\n" for char in answer.err) and len(answer.err) < 2000
        assert not list(Path().glob(".out*"))
        return answer.err

    return run


def edit_header(folder, change):
    """Let `change` edit a header in place, or return its text."""
    header, data = unpack((folder / SINGLE).read_bytes())
    text = change(header)
    (folder / SINGLE).write_bytes(pack(text or json.dumps(header), data))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**63 - 1, 33_000_000])
def test_the_length_of_a_header(refused, place, length):
    raw = (place / "first" / SINGLE).read_bytes()
    (place / "first" / SINGLE).write_bytes(length.to_bytes(8, "little") + raw[8:] + bytes(1000))
    assert f"a header of {length} bytes" in refused()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[0,", "[-0,"),
        ('"__metadata__": {', '"__metadata__": {"x": "\\ud800", '),
        ('"__metadata__": {', '"__metadata__": {"\\udfff": "x", '),
        ("model.norm.weight", "model.norm\\ud800"),
        ("model.norm.weight", "model.norm\\u0000"),
        ("model.norm.weight", "model.norm\\n: fine"),
        ("model.norm.weight", "n" * 1001),
    ],
)
def test_what_only_a_lenient_parser_takes(refused, place, old, new):
    """Python reads these headers; the format's library refuses the first four, the others could control a terminal."""
    for name in NAMES:
        edit_header(place / name, lambda header: json.dumps(header).replace(old, new, 1))
    assert "damaged" in refused()


def test_a_size_that_no_zero_excuses(refused, place):
    """The format's library multiplies from the left, and refuses a product that overflows on the way."""
    for name in NAMES:
        header, data = unpack((place / name / SINGLE).read_bytes())
        header["empty"] = {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [len(data)] * 2}
        (place / name / SINGLE).write_bytes(pack(json.dumps(header), data))
    assert "damaged" in refused()


def test_a_key_given_twice_at_the_end_of_very_many(refused, place):
    entries = "".join(f'"{i}":0,' for i in range(300_000))
    edit_header(place / "first", lambda header: f'{{{entries}"299999":0}}')
    begun = time.monotonic()
    assert "'299999' is given twice" in refused()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "training.json", INDEX])
@pytest.mark.parametrize("depth", [101, 400, 100_000])
def test_json_nested_very_deep(refused, sharded, file, depth):
    for name in NAMES:
        content = (sharded / name / file).read_text() if (sharded / name / file).is_file() else '{"a": 0}'
        deep = '"deep": ' + "[" * depth + "]" * depth + ", "
        (sharded / name / file).write_text(content.replace("{", "{" + deep, 1))
    assert f"{file}: the file is damaged" in refused()


@pytest.mark.parametrize("recorded", [7, True, ["x"], {"a": 1}, 1.5])
def test_the_record_of_a_base_that_is_no_text(refused, place, recorded):
    (place / "first/training.json").write_text(json.dumps({"base_hash": recorded}))
    assert "trained from another base" in refused()


def test_a_value_of_the_config_may_fill_a_line_but_not_the_screen(refused, place):
    edit_json(place / "first/config.json", model_type="m" * 100_000, architectures=["\x1b[2J"])
    assert "`model_type` differs" in refused()


@pytest.mark.parametrize("file", ["tokenizer.json", "training.json"])
def test_a_pipe_keeps_nobody_waiting(refused, place, file):
    os.mkfifo(place / "first" / file)
    assert "not a file" in refused()


def test_a_pipe_among_the_weights_keeps_nobody_waiting(cli, place):
    (place / "first/training.json").write_text(json.dumps({"base_hash": weights_hash(place / "sft")}))
    os.mkfifo(place / "sft/pipe.safetensors")
    assert cli(*ARGS).code == 0


def test_half_a_character_in_the_config_is_copied_as_it_stands(cli, place):
    for name in NAMES:
        edit_json(place / name / "config.json", note="\ud800")
    assert cli(*ARGS).code == 0
    assert json.loads((place / "out/config.json").read_text())["note"] == "\ud800"


class TestIndex:
    """The index of a sharded checkpoint names no file outside its folder, and fits its files."""

    FILE = "model-00001-of-00002.safetensors"

    @pytest.mark.parametrize(
        "target",
        [
            *("../second/" + FILE, "/etc/passwd", ".", "..", "", "sub/" + FILE, FILE + "\0", "\ud800.safetensors"),
            *(None, 7, True, [FILE], {"a": FILE}, "config.json", "x" * 300 + ".safetensors", "\x1b[2J.safetensors"),
        ],
    )
    def test_a_file_elsewhere(self, refused, sharded, target):
        (sharded / "first/sub").mkdir()
        (sharded / "first/sub" / self.FILE).write_bytes((sharded / "first" / self.FILE).read_bytes())
        index = json.loads((sharded / "first" / INDEX).read_text())
        name = next(iter(index["weight_map"]))
        edit_json(sharded / "first" / INDEX, weight_map=index["weight_map"] | {name: target})
        assert "the index names a file that is not in the checkpoint's folder" in refused()

    @pytest.mark.parametrize("how", ["absolute", "relative", "loop", "nowhere"])
    def test_a_link_that_leaves_the_folder(self, refused, sharded, how):
        path = sharded / "first" / self.FILE
        targets = {"absolute": sharded / "second" / self.FILE, "relative": Path("../second") / self.FILE}
        targets |= {"loop": Path(self.FILE), "nowhere": Path("absent.safetensors")}
        path.unlink()
        path.symlink_to(targets[how])
        said = refused()
        assert "the index names a file" in said if how in ("absolute", "relative") else "shards are missing" in said

    def test_a_folder_or_nothing_where_a_shard_should_be(self, refused, sharded):
        (sharded / "first" / self.FILE).unlink()
        assert f"no {self.FILE}" in refused()
        (sharded / "first" / self.FILE).mkdir()
        assert f"no {self.FILE}" in refused()

    @pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"absent": FILE}])
    def test_tensors_that_are_elsewhere(self, refused, sharded, weight_map):
        edit_json(sharded / "first" / INDEX, weight_map=weight_map)
        assert f"{INDEX}: the file is damaged" in refused()

    def test_two_tensors_change_files(self, refused, sharded):
        index = json.loads((sharded / "first" / INDEX).read_text())["weight_map"]
        first, second = list(index)[0], list(index)[-1]
        edit_json(sharded / "first" / INDEX, weight_map=index | {first: index[second], second: index[first]})
        assert "does not fit its files" in refused()

    def test_one_tensor_in_two_files(self, refused, sharded):
        files = sorted((sharded / "first").glob("*.safetensors"))
        files[1].write_bytes(files[0].read_bytes())
        assert "is also in" in refused()

    def test_its_total_decides_nothing(self, cli, sharded):
        edit_json(sharded / "first" / INDEX, metadata={"total_size": -1})
        assert cli(*ARGS, "--alpha", 1, "--beta", 0).code == 0
        check_formula(sharded / "out", sharded / "sft", [sharded / "first", sharded / "second"], [0.5, 0.5], 1, 0)

    def test_beside_a_single_file_it_is_not_looked_at(self, cli, sharded):
        """Read as transformers does, so that the merge uses the weights that the policy's users run."""
        for name in NAMES:
            tensors = {key: values for key, (_, values) in read_plain(sharded / name).items()}
            save_plain(sharded / "whole" / name, {key: 2 * values for key, values in tensors.items()})
            os.rename(sharded / "whole" / name / SINGLE, sharded / name / SINGLE)
        assert cli(*ARGS, "--beta", 0).code == 0
        check_formula(sharded / "out", sharded / "sft", [sharded / "first", sharded / "second"], [0.5, 0.5], 1, 0)


def test_brackets_in_names_are_brackets(cli, place):
    """rich reads `[/red]` as the end of a colour, and fails without its start."""
    tensors = {name: values for name, (_, values) in read_plain(place / "first").items()}
    save_plain(place / "[/red]", tensors | {"v_head.[/red]": np.zeros(3, np.float32)})
    answer = cli(*ARGS[:3], "--policy", "[/b]=[/red]", "--policy", "second", "--out", "[/i]")
    assert answer.code == 0 and "[/b]" in answer.out and "v_head.[/red]" in answer.out and "[/i]" in answer.out


def test_what_is_left_of_an_output_with_brackets_is_found(cli, place):
    (place / ".[1].partial-0").mkdir()
    assert cli(*ARGS[:-1], "[1]").code == 0
    assert sorted(path.name for path in place.iterdir()) == sorted([*NAMES, "[1]"])


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_are_no_text(place, encoding):
    folder = b"caf\xe9"
    os.rename(b"first", folder)
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding}
    command = [*COMMAND, *ARGS[:3], "--policy", folder, "--policy", "second"]
    done = subprocess.run([*command, "--out", b"out\xe9"], capture_output=True, env=environment)
    assert done.returncode == 0 and done.stderr == b"", done
    record = json.loads((Path(os.fsdecode(b"out\xe9")) / "merge.json").read_text())
    assert os.fsencode(record["policies"][os.fsdecode(folder)]["path"]).endswith(folder)


@pytest.mark.parametrize("out", [".", "..", "sub/.."])
def test_an_output_without_a_name(refused, place, tmp_path, monkeypatch, out):
    for folder in ("sub", "elsewhere"):
        (place / folder).mkdir()
    monkeypatch.chdir(place / "elsewhere")
    where = [f"../{part}" if part in NAMES else part for part in ARGS[:-1]]
    said = refused(*where, "sub/.." if out == "sub/.." else out, "--overwrite")
    assert "not a name for a new folder" in said or "around an input" in said


def test_an_output_that_is_a_link_is_replaced_and_what_it_shows_stays(cli, refused, place):
    (place / "kept").mkdir()
    (place / "kept/file").touch()
    (place / "out").symlink_to("kept")
    assert "exists" in refused()
    assert cli(*ARGS, "--overwrite").code == 0
    assert not (place / "out").is_symlink() and (place / "kept/file").is_file()
    assert sorted(path.name for path in place.iterdir()) == sorted([*NAMES, "kept", "out"])
    (place / "loop").symlink_to("loop")
    assert "exists" in refused(*ARGS[:-1], "loop")


def test_a_refusal_leaves_no_empty_parents(refused, place):
    file = place / "first" / SINGLE
    file.write_bytes(file.read_bytes()[:-4] + b"\xff\xff\xff\x7f")
    refused(*ARGS[:-1], "new/deep/out")
    refused(*ARGS[:-1], "many", "--lam", "0.2", "--lam", "0.4")
    assert sorted(path.name for path in place.iterdir()) == sorted(NAMES)


def limited(memory):
    """Return a child's first function, which limits its memory to `memory` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


@pytest.mark.parametrize(
    ("size", "memory"), [(5 << 20, 1 << 30), pytest.param(31_999_990, 3 << 29, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "start, item, end",
    [
        pytest.param("[", "[],", "[]]", marks=pytest.mark.slow),
        pytest.param('{"__metadata__":{', '"NUMBER!":"",', '"":""}}', marks=pytest.mark.slow),
        ("{", '"NUMBER!":[{}],', '"":0}'),
    ],
)
def test_a_header_of_very_many_small_values(place, size, memory, start, item, end):
    items = (item.replace("NUMBER!", f"{i:07}") for i in range(size // len(item) - 3))
    (place / "first" / SINGLE).write_bytes(pack(start + "".join(items) + end, b""))
    done = subprocess.run(
        [*COMMAND, *ARGS], capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limited(memory), timeout=120
    )
    assert done.returncode == 1 and "first" in done.stderr and "Traceback" not in done.stderr, done


def test_buffers_are_compared_piece_by_piece(cli, place):
    """A sparse file may declare more than fits in memory; here 256 MB, in pieces of 2 MB."""
    size = 1 << 28
    for name in NAMES:
        header, data = unpack((place / name / SINGLE).read_bytes())
        header["holes"] = {"dtype": "I64", "shape": [size // 8], "data_offsets": [len(data), len(data) + size]}
        raw = pack(json.dumps(header), data)
        (place / name / SINGLE).write_bytes(raw)
        os.truncate(place / name / SINGLE, len(raw) + size)
    tracemalloc.start()
    try:
        assert cli(*ARGS, "--dry-run").code == 0
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_very_many_tensors_alike_cost_no_pairs(cli, place):
    """Several tensors have a row for every token, like embeddings: which of them are tied?"""
    random = np.random.default_rng(0)
    tensors = {name: values for name, (_, values) in read_plain(place / "sft").items()}
    tensors |= {f"m{i}": random.standard_normal((8, 1), np.float32) for i in range(4000)}
    for name in NAMES:
        (place / name / SINGLE).unlink()
        save_file(tensors, place / name / SINGLE)
        edit_json(place / name / "config.json", tie_word_embeddings=True)
    begun = time.monotonic()
    assert cli(*ARGS, "--dry-run").code == 0
    assert time.monotonic() - begun < 20


class Harm:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled_and_no_code_of_a_checkpoint_runs(cli, place, tmp_path):
    harmed = tmp_path / "harmed"
    code = f"open({str(harmed)!r}, 'w').close()\n"
    auto_map = {"AutoConfig": "harm.Harm", "AutoModelForCausalLM": "harm.Harm", "AutoTokenizer": ["harm.Harm", None]}
    for name in NAMES:
        for file in ("harm.py", "modeling_llama.py", "sitecustomize.py", "__init__.py", "torch.py"):
            (place / name / file).write_text(code)
        for file in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "tokenizer.model"):
            (place / name / file).write_bytes(pickle.dumps(Harm(harmed)))
        edit_json(place / name / "config.json", auto_map=auto_map, trust_remote_code=True)
        (place / name / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert cli(*ARGS).code == 0
    (place / "first" / SINGLE).unlink()
    assert "pickled weights are never opened" in cli(*ARGS, "--overwrite").err
    # A pickle under the name of a safetensors file.
    (place / "first" / SINGLE).write_bytes(pickle.dumps(Harm(harmed)))
    assert cli(*ARGS, "--overwrite").code == 1
    assert not harmed.exists()
    with open(place / "first/pytorch_model.bin", "rb") as file:
        pickle.load(file).close()
    assert harmed.exists()


def test_a_record_may_not_fill_the_screen(cli, refused, place):
    assert cli(*ARGS[:-1], "again").code == 0
    for key in ("method", "dtype", "max_shard_size", "layers"):
        record = json.loads((place / "again/merge.json").read_text())
        (place / "long.json").write_text(json.dumps(record | {key: "y" * 100_000}))
        refused("merge", "--from", "long.json", "--out", "out")


def test_a_policy_that_a_record_does_not_know(cli, refused, place):
    assert cli(*ARGS[:-1], "again").code == 0
    said = refused("merge", "--from", "again", "--policy", "third=first", "--out", "out")
    assert "the record has no policy `third`" in said and "expected: first, second" in said
