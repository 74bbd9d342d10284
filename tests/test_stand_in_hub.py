"""The stand-in hub serves data sets, with subsets and splits, and models to the Hub's libraries, and accepts models."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stand_in_hub import COMMIT, stand_in_hub

PARQUET_BRANCH = "refs/convert/parquet"
CARD = """\
---
configs:
- config_name: first
  data_files: [{split: train, path: "first/train/*"}, {split: test, path: "first/test/*"}]
- config_name: second
  data_files: [{split: train, path: "second/train/*"}]
---
"""
# Each call is a list of keyword arguments; the rows come back, or the kind of the error.
PROGRAM = """\
import json, sys
import datasets

found = []
for call in json.loads(sys.argv[1]):
    try:
        found.append(list(datasets.load_dataset(**call)["text"]))
    except Exception as error:
        found.append(type(error).__name__)
print(json.dumps(found))
"""


def write_rows(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(texts)}), path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A hub with data sets of three layouts and a model; the environment of a process that knows only this hub."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("with-card", "folders"):
        for subset, split in (("first", "train"), ("first", "test"), ("second", "train")):
            write_rows(root / "datasets/org" / name / subset / split / "0000.parquet", f"{subset} {split}", "more")
    (root / "datasets/org/with-card/README.md").write_text(CARD)
    write_rows(root / "datasets/org/plain/train.parquet", *map(str, range(100)))
    (root / "org/model/folder").mkdir(parents=True)
    (root / "org/model/folder/config.json").write_text("{}")
    with stand_in_hub(root) as hub:
        yield (
            hub,
            {
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path_factory.mktemp("home")),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "*",
            },
        )


def python(environment, program, *arguments):
    """Run a program in a process: the Hub's libraries read their environment at import."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_data_sets(places):
    hub, environment = places
    calls = {
        "subset": {"path": "org/with-card", "name": "first", "split": "test"},
        "revision": {"path": "org/with-card", "name": "second", "split": "train", "revision": PARQUET_BRANCH},
        "slices": {"path": "org/plain", "split": "train[:1%]+train[50%:52%]"},
        "folder": {"path": "org/folders", "data_dir": "first", "split": "test", "revision": PARQUET_BRANCH},
        # As at the Hub: without a card, the branch of Parquet files has one subset with all folders.
        "no card": {"path": "org/folders", "name": "first", "split": "test", "revision": PARQUET_BRANCH},
        "no split": {"path": "org/plain", "split": "test"},
        "nothing": {"path": "org/none", "split": "train"},
    }
    found = dict(zip(calls, json.loads(python(environment, PROGRAM, json.dumps([*calls.values()]))), strict=True))
    assert found == {
        "subset": ["first test", "more"],
        "revision": ["second train", "more"],
        "slices": ["0", "50", "51"],
        "folder": ["first test", "more"],
        "no card": "ValueError",
        "no split": "ValueError",
        "nothing": "DatasetNotFoundError",
    }
    assert any("/datasets/org/plain/resolve/" in path for _, path in hub.asked)


def test_models(places):
    _, environment = places
    program = "import huggingface_hub; print(huggingface_hub.snapshot_download('org/model'))"
    folder = python(environment, program).strip()
    assert folder.endswith(COMMIT) and os.listdir(folder) == ["folder"]
    assert os.listdir(f"{folder}/folder") == ["config.json"]


@pytest.mark.parametrize("xet", ["1", "0"], ids=["lfs", "xet"])
def test_uploads(places, tmp_path, xet):
    """Files that the Hub's library uploads exist, deleted ones do not."""
    hub, environment = places
    (tmp_path / "config.json").write_text(json.dumps({"xet": xet}))
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    program = (
        "import sys\n"
        "from huggingface_hub import HfApi\n"
        "hub = HfApi()\n"
        "for _ in range(2): hub.create_repo('org/new', exist_ok=True)\n"
        "hub.upload_file(path_or_fileobj=b'old', path_in_repo='old.txt', repo_id='org/new')\n"
        "hub.upload_folder(repo_id='org/new', folder_path=sys.argv[1], delete_patterns='*.txt')\n"
        "print(sorted(hub.list_repo_files('org/new')))\n"
    )
    environment = environment | {"HF_HUB_DISABLE_XET": xet, "HF_TOKEN": "any"}
    assert python(environment, program, str(tmp_path)).strip() == "['config.json', 'model.safetensors']"
    assert (hub.root / "org/new/config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    assert (xet == "0") == bool(hub.pieces)
