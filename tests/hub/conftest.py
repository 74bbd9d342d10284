"""Fixtures of publishing: a hub that takes uploads, and a merged folder to upload."""

import shutil

import pytest
from plain_checkpoints import save_family
from stand_in_hub import stand_in_hub

from rewarded_lines import merge

# Of the form that the Hub's tokens have.
TOKEN = "hf_" + "Canary" * 6
WHERE = ("ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_TOKEN_PATH")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The only hub that this process knows; it accepts uploads with the token."""
    from huggingface_hub import constants

    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with stand_in_hub(tmp_path / "hub") as hub:
        hub.tokens = {TOKEN}
        for name, value in zip(WHERE, (hub.url, False, True, str(tmp_path / "no-login")), strict=True):
            monkeypatch.setattr(constants, name, value)
        yield hub


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A base, two policies, and their merge of several shards."""
    folder = tmp_path_factory.mktemp("publishing")
    save_family(folder / "org", hidden=64)
    policies = [folder / "org" / name for name in ("first", "second")]
    merge(folder / "org/sft", policies, out=folder / "merged", max_shard_size="20KB")
    return folder


@pytest.fixture
def inputs(source, tmp_path, monkeypatch):
    """A base and two policies in the working directory, and the options that name them."""
    shutil.copytree(source / "org", tmp_path / "work/org")
    monkeypatch.chdir(tmp_path / "work")
    return ("--base", "org/sft", "--policy", "org/first", "--policy", "org/second")


@pytest.fixture
def merged(source, inputs, tmp_path):
    """A merged folder of several shards."""
    return shutil.copytree(source / "merged", tmp_path / "work/merged")
