"""A project with a tiny SFT model and rewards, made once; tests get copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from small_recipes import make_project


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these are done before a second thread has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
