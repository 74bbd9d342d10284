"""Hub ids as inputs, with a hub on the loopback interface; local folders need no hub."""

import json
import os
from pathlib import Path

import pytest
from command import ENVIRONMENT, prepared_run
from plain_checkpoints import save_family
from stand_in_hub import COMMIT, stand_in_hub

NAMES = ("sft", "first", "second")
IDS = ("org/sft", "org/first", "org/second")


@pytest.fixture
def hub(request, tmp_path):
    """A hub that holds a base and two policies."""
    save_family(tmp_path / "models/org", NAMES, getattr(request, "param", 1))
    for name in NAMES:
        (tmp_path / "models/org" / name / "tokenizer.json").write_text("{}")
        (tmp_path / "models/org" / name / "pytorch_model.bin").write_text("not asked for")
    with stand_in_hub(tmp_path / "models") as hub:
        yield hub


@pytest.fixture
def merge(hub, tmp_path):
    """Run a merge in a process that knows only this hub."""
    (tmp_path / "work").mkdir()

    def run(base, first, second, out, **environment):
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        places |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "NO_PROXY": "*"}
        args = ("merge", "--base", base, "--policy", first, "--policy", second, "--out", out)
        return prepared_run(args, tmp_path / "work", ENVIRONMENT | places | environment)

    return run


def weights(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def refusal(done):
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done
    return done.stderr


@pytest.mark.parametrize("hub", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["one file", "shards"], indirect=True)
def test_ids_give_the_same_bits_as_folders_and_again_from_the_cache(hub, merge, tmp_path):
    folders = [tmp_path / "models" / name for name in IDS]
    assert merge(*folders, "local").returncode == 0
    # Folders cause no request.
    assert hub.asked == []
    done = merge(*IDS, "fetched")
    assert done.returncode == 0, done
    assert not any("pytorch_model.bin" in path for _, path in hub.asked)
    asked = len(hub.asked)
    assert merge(*IDS, "offline", HF_HUB_OFFLINE="1").returncode == 0
    assert len(hub.asked) == asked
    work = tmp_path / "work"
    assert weights(work / "local") == weights(work / "fetched") == weights(work / "offline")
    local, fetched = (json.loads((work / out / "merge.json").read_text()) for out in ("local", "fetched"))
    assert local["base"]["files"] == fetched["base"]["files"]
    # The cache has links to its blobs.
    (snapshot,) = (tmp_path / "home/hub").glob(f"models--org--first/snapshots/{COMMIT}")
    assert all(path.is_symlink() for path in snapshot.iterdir())


def test_an_id_that_is_not_there(hub, merge):
    said = refusal(merge("org/sft", "org/first", "org/none", "out"))
    assert said.count("neither a folder here nor a model that the Hub gives us") == 1 and "org/none" in said
    assert said.count("remedy") == 1


def test_not_in_the_cache_and_offline(hub, merge):
    said = refusal(merge(*IDS, "out", HF_HUB_OFFLINE="1"))
    assert said.count("neither a folder here nor a model that the Hub gives us") == 3
    assert hub.asked == []


# The Hub's library tries for ten seconds to fetch the rest of what was cut.
@pytest.mark.parametrize(
    "fault", [*(pytest.param(fault, marks=pytest.mark.slow) for fault in ("cut", "garbled")), "broken", "outside"]
)
def test_a_hub_out_of_order(hub, merge, tmp_path, fault):
    hub.fault = fault
    inputs = (tmp_path / "models/org/sft", "org/first", tmp_path / "models/org/second")
    said = refusal(merge(*inputs, "out"))
    assert "neither a folder here nor a model that the Hub gives us" in said
    assert not list(tmp_path.rglob("outside.json")) and not (tmp_path / "work/out").exists()
    # A half-fetched model does not pass for a checkpoint later.
    hub.fault = ""
    # Of a listing with such a file, some versions of the Hub's library keep a record and refuse the model for good.
    assert fault == "outside" or merge(*inputs, "out").returncode == 0


def test_no_hub_there(merge):
    said = refusal(merge(*IDS, "out", HF_ENDPOINT="http://127.0.0.1:9"))
    assert said.count("neither a folder here nor a model that the Hub gives us") == 3


@pytest.mark.parametrize("hub", [2], indirect=True)
def test_a_link_out_of_the_cache_is_refused(hub, merge, tmp_path):
    assert merge(*IDS, "out").returncode == 0
    (snapshot,) = (tmp_path / "home/hub").glob(f"models--org--first/snapshots/{COMMIT}")
    shard = next(snapshot.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(tmp_path / "models/org/first" / shard.name)
    said = refusal(merge(*IDS, "again", HF_HUB_OFFLINE="1"))
    assert "names a file that is not in the checkpoint's folder" in said


def test_no_socket_is_opened_for_folders(cli, tmp_path, monkeypatch):
    import socket

    def refuse(*args, **options):
        raise AssertionError("a socket for local files")

    save_family(tmp_path / "org")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    answer = cli("merge", "--base", "org/sft", "--policy", "org/first", "--policy", Path("org/second"), "--out", "out")
    assert answer.code == 0 and os.path.isdir("out"), answer
    assert cli("merge", "--base", "org/sft", "--policy", "org/typo", "--out", "other").code == 1
