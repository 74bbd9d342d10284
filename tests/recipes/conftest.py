"""A project with a tiny SFT model and rewards, made once; tests get copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_recipes import make_project


@pytest.fixture(scope="session")
def work_source(tmp_path_factory) -> Path:
    """The project's files."""
    return make_project(tmp_path_factory.mktemp("work"))


@pytest.fixture
def work(work_source, tmp_path) -> Path:
    """A fresh copy of the project."""
    folder = tmp_path / "work"
    shutil.copytree(work_source, folder)
    return folder
