"""vLLM finds the plugin of a checkout, installed or not."""

import pytest
from plugin_server import environment


@pytest.fixture(autouse=True)
def plugin(tmp_path, monkeypatch):
    """Let this process and servers that it starts find the entry point."""
    monkeypatch.setenv("PYTHONPATH", environment(tmp_path)["PYTHONPATH"])
    monkeypatch.syspath_prepend(tmp_path / "entry")
