"""A vLLM server with the plugin, as a checkout without an installed entry point runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from tiny_adapters import save_adapter

ENTRY = "[vllm.general_plugins]\nrewarded_lines = rewarded_lines.serving.vllm_plugin:register\n"
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def save_policies(folder: Path) -> dict[str, str]:
    """Save two adapters of `sft` with settings that differ, and a project of them; return them by name."""
    save_adapter(folder / "sft", folder / "one", 1, r=4, lora_alpha=16)
    patterns = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 30}}
    targets = ["q_proj", "up_proj"]
    save_adapter(
        folder / "sft", folder / "two", 2, r=6, lora_alpha=9, use_rslora=True, target_modules=targets, **patterns
    )
    (folder / "adapters.yaml").write_text("base: sft\npolicies: {one: one, two: two}\n")
    return {"one": "one", "two": "two"}


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Return the environment of a server; `folder` gets what an installed package tells of its entry points."""
    facts = folder / "entry" / "rewarded_lines_entry-0.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "entry_points.txt").write_text(ENTRY)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: rewarded-lines-entry\nVersion: 0\n")
    found = [str(Path(__file__).parents[1]), str(facts.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **SETTINGS, **settings, "PYTHONPATH": os.pathsep.join(filter(None, found))}


class Server:
    """A running server: its address and its processes."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"

    def ask(self, model: str, prompt: str, **more: object) -> dict:
        """Return the answer to a completion, greedy by default; an error has its `status`."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12, "return_token_ids": True, **more}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return {"status": error.code, **json.load(error)}

    def tokens(self, model: str, prompt: str, **more: object) -> tuple[int, ...]:
        """Return the tokens of an answer."""
        return tuple(self.ask(model, prompt, **more)["choices"][0]["token_ids"])

    def memory(self) -> int:
        """Return the bytes that the server and its workers hold."""
        me = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [me, *me.children(recursive=True)])


@contextmanager
def plugin_server(folder: Path, *options: str, **settings: str) -> Iterator[Server]:
    """Run vLLM's server for `sft` in the folder; an AssertionError with its log if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "sft", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "64", "--enable-lora", *options]
    log = folder / f"server-{port}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder, **settings), stdout=out, stderr=out, start_new_session=True
        )
    server = Server(process, port)
    try:
        _wait(server, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server, log: Path) -> None:
    while server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health") as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-6000:])
