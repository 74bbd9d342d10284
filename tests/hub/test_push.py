"""`push` and `merge --push-to-hub` with a hub on the loopback interface: requests and messages."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from command import COMMAND, ENVIRONMENT

TOKEN = "hf_" + "Canary" * 6
ID = "me/merge"


def sent(hub, command, part):
    return [path for method, path, _ in hub.sent if method == command and part in path]


def uploaded(hub):
    """Return the number of large files sent."""
    return len(sent(hub, "PUT", "/storage/"))


def refusal(answer):
    assert answer.code == 1 and answer.out == "" and "Traceback" not in answer.err, answer
    assert TOKEN not in answer.err and "lets-others-in" not in answer.err
    return answer.err


def no_token_in(folder):
    assert not any(TOKEN.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return True


def test_a_merge_is_uploaded_with_its_card(hub, inputs, cli, tmp_path):
    answer = cli("merge", *inputs, "--out", "merged", "--push-to-hub", ID)
    assert answer.code == 0, answer
    there = {path.name: path.read_bytes() for path in (tmp_path / "hub" / ID).iterdir()}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "work/merged").iterdir()}
    assert {"README.md", "merge.json", "config.json", "model.safetensors"} == set(there)
    assert f'from_pretrained("{ID}")' in there["README.md"].decode()
    assert len(hub.commits) == 1 and f"{hub.url}/{ID}/commit/" in answer.out
    assert sent(hub, "POST", "/api/validate-yaml")
    assert hub.visibility == {ID: ""}
    assert TOKEN not in answer.out + answer.err and no_token_in(tmp_path / "hub") and no_token_in(tmp_path / "work")


def test_json_names_the_commit(hub, merged, cli):
    told = json.loads(cli("push", merged, ID, "--private", "--json").out)
    assert told["repository"] == ID and told["commit"].startswith(f"{hub.url}/{ID}/commit/")
    assert hub.visibility == {ID: "private"}


def test_a_failed_upload_goes_on(hub, inputs, cli, tmp_path):
    """All shards but one arrive; the second upload sends that one alone."""
    args = ("merge", *inputs, "--max-shard-size", "17KB", "--out", "merged")
    assert cli(*args).code == 0
    shards = sorted(Path("merged").glob("*.safetensors"))
    assert len(shards) >= 3
    stuck = subprocess.run(["sha256sum", shards[1]], capture_output=True, text=True, check=True).stdout.split()[0]
    hub.refused = {stuck: 403}
    failed = cli(*args, "--overwrite", "--push-to-hub", ID)
    assert failed.code == 1 and "Traceback" not in failed.err and TOKEN not in failed.err
    # The merged folder exists, and the output names it.
    assert "merged" in failed.out and (tmp_path / "work/merged/merge.json").is_file()
    command = re.search(r"go on with: rewarded-lines (push .*)", failed.err)[1].split()
    assert command == ["push", "merged", ID]
    assert not hub.commits and uploaded(hub) == len(shards) and len(hub.large) == len(shards) - 1
    hub.refused, hub.sent = {}, []
    assert cli(*command).code == 0
    assert sent(hub, "PUT", "/storage/") == [f"/storage/{stuck}?signature=lets-others-in"]
    assert len(hub.commits) == 1
    there = tmp_path / "hub" / ID
    assert all((there / shard.name).read_bytes() == shard.read_bytes() for shard in shards)
    # The third time nothing is sent.
    hub.sent = []
    assert cli(*command).code == 0
    assert uploaded(hub) == 0 and len(hub.commits) == 1


def test_the_same_command_goes_on(hub, inputs, cli):
    args = ("merge", *inputs, "--out", "merged", "--overwrite", "--push-to-hub", ID)
    hub.refused = {"/commit/": 403}
    assert cli(*args).code == 1
    assert uploaded(hub) == 1 and not hub.commits
    hub.refused = {}
    assert cli(*args).code == 0
    assert uploaded(hub) == 1 and len(hub.commits) == 1


def test_an_earlier_models_weights_leave(hub, merged, cli, tmp_path):
    there = tmp_path / "hub" / ID
    there.mkdir(parents=True)
    for name in ("model-00001-of-00009.safetensors", "adapter_model.safetensors", "notes.md", "model.gguf"):
        (there / name).write_text("earlier")
    assert cli("push", merged, ID).code == 0
    names = {path.name for path in there.iterdir()}
    assert names == {path.name for path in merged.iterdir()} | {"notes.md", "model.gguf"}


def test_a_branch(hub, merged, cli, tmp_path):
    for _ in range(2):
        assert cli("push", merged, ID, "--revision", "second").code == 0
    assert (tmp_path / "hub" / ID / ".branches/second/model.safetensors.index.json").is_file()
    assert not (tmp_path / "hub" / ID / "README.md").exists()
    # Branch names may have a slash.
    assert cli("push", merged, ID, "--revision", "a/b").code == 0


def test_what_lies_beside_stays(hub, merged, cli, tmp_path):
    (merged / ".secret").write_text("mine")
    (merged / ".cache").mkdir()
    (merged / ".cache/file").write_text("mine")
    assert cli("push", merged, ID).code == 0
    assert not [path for path in (tmp_path / "hub" / ID).rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("part", "code", "remedy"),
    [
        ("/api/repos/create", 401, "hf auth login"),
        ("/api/repos/create", 403, "may write there"),
        ("/api/repos/create", 500, "push merged me/merge"),
        ("/api/validate-yaml", 401, "hf auth login"),
        ("/preupload/", 404, "owner's name"),
        ("/info/lfs/", 403, "may write there"),
        ("/commit/", 403, "may write there"),
    ],
)
def test_a_hub_that_refuses_is_one_message(hub, merged, cli, part, code, remedy):
    """The hub's answers repeat the token; no message may show it."""
    hub.refused = {part: code}
    said = refusal(cli("push", "merged", ID))
    assert remedy in said and said.count("remedy") == 1 and "rewarded-lines push merged me/merge" in said
    assert not hub.commits and merged.is_dir()


def test_a_token_that_is_not_one(hub, merged, cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong-token-of-another-form")
    said = cli("push", merged, ID).err
    assert "401" in said and "wrong-token" not in said and "hf auth login" in said


def test_no_hub_there(hub, merged, cli, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the upload failed; the merged folder is whole" in refusal(cli("push", merged, ID))


def test_a_disk_that_fails(hub, merged, cli, monkeypatch):
    """hf-xet writes pieces of files to the disk while it sends them."""
    from huggingface_hub import HfApi

    def fail(*args, **options):
        raise OSError(28, f"No space left on device, Bearer {TOKEN}")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    assert "No space left on device" in refusal(cli("push", merged, ID))


def test_what_is_known_before_is_refused_before_anything_is_merged(hub, inputs, cli, monkeypatch, tmp_path):
    from huggingface_hub import constants

    args = ("merge", *inputs, "--out", "merged")
    for wrong in ("name", "a/b/c", "a/..", "https://hub/a/b", "a/b--c", TOKEN, "-a/b", "a/" + "b" * 97):
        assert "not the id of a repository" in refusal(cli(*args, "--push-to-hub", wrong)), wrong
    assert "one repository holds one model" in refusal(cli(*args, "--push-to-hub", ID, "--lam", "0.2", "--lam", "0.3"))
    assert "nothing is uploaded" in refusal(cli(*args, "--private"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "must stay offline" in refusal(cli(*args, "--push-to-hub", ID))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    said = refusal(cli(*args, "--push-to-hub", ID))
    assert "no token for the Hub" in said and "hf auth login" in said
    assert not (tmp_path / "work/merged").exists() and not hub.asked


def test_a_dry_run_uploads_nothing(hub, inputs, cli):
    assert cli("merge", *inputs, "--dry-run", "--push-to-hub", ID).code == 0
    assert not hub.asked


def test_only_merged_folders(hub, inputs, cli, tmp_path):
    assert "not a merged folder" in refusal(cli("push", "org/sft", ID))
    assert "no such folder" in refusal(cli("push", "nothing", ID))
    assert not hub.asked


def test_the_login_file_and_a_process_of_its_own(hub, merged, tmp_path):
    """All settings come from the environment; the login file's token is sent and not shown."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in (ENVIRONMENT | places).items() if name != "HF_TOKEN"}
    command = [*COMMAND, "push", str(merged), ID]
    done = subprocess.run(command, env=environment | {"NO_PROXY": "*"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done
    assert (tmp_path / "hub" / ID / "README.md").is_file() and TOKEN not in done.stdout


@pytest.mark.slow
def test_xet(hub, merged, tmp_path):
    """hf-xet sends pieces of files; a later process does not send again those that arrived."""
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    environment = ENVIRONMENT | home | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "0"}

    def push():
        command = [*COMMAND, "push", str(merged), ID]
        hub.sent = []
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert TOKEN not in done.stdout + done.stderr
        return done

    hub.refused = {"/commit/": 403}
    failed = push()
    assert failed.returncode == 1 and "go on with: rewarded-lines push" in failed.stderr, failed
    assert hub.pieces and not hub.commits and not uploaded(hub)
    assert all(TOKEN.encode() not in body for body in hub.pieces.values())
    hub.refused = {}
    assert push().returncode == 0
    assert not sent(hub, "POST", "/xet/v1/xorbs/") and len(hub.commits) == 1
    assert no_token_in(tmp_path / "home")


def test_a_token_in_a_command_is_not_kept(inputs, cli, tmp_path, monkeypatch):
    """merge.json keeps a score's command without a token in it."""
    monkeypatch.setenv("HF_TOKEN", "token-of-another-form")
    score = f"sh -c 'echo 1 # {TOKEN} token-of-another-form' {{model}}"
    assert cli("merge", *inputs, "--method", "greedy", "--score", score, "--out", "merged").code == 0
    kept = (tmp_path / "work/merged/merge.json").read_text()
    assert "hf_…" in kept and "$HF_TOKEN" in kept and "token-of-another-form" not in kept
    assert no_token_in(tmp_path / "work")


def test_no_network_without_the_option(hub, inputs, cli):
    assert cli("merge", *inputs, "--out", "merged").code == 0
    assert not hub.asked and os.path.isfile("merged/README.md")
