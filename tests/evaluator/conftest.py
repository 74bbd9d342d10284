"""A finished sweep, made once for the tests that go on from one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rewarded_lines import sweep


@pytest.fixture(scope="session")
def finished_sweep(tiny_source, tmp_path_factory) -> Path:
    """The folder of the tiny project's sweep with two points a method; tests get copies."""
    folder = tmp_path_factory.mktemp("finished") / "tiny"
    shutil.copytree(tiny_source, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sweep(engine="hf", points=2)
    return folder / "sweep"


@pytest.fixture
def swept(tiny, finished_sweep) -> Path:
    """The tiny project after its sweep, as the working directory."""
    shutil.copytree(finished_sweep, tiny / "sweep")
    return tiny
