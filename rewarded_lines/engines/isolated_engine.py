"""Generation in a child process, so that the engine leaves nothing behind in this one.

A trainer needs this: vLLM sets up torch.distributed, which the trainer does itself; and a model that is spread over
several processes cannot answer in one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.base import Response
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.errors import fail
from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent

# Variables that launchers set for their own processes; the child must not see them.
_LAUNCHER = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "PARALLELISM_CONFIG_")
_LAUNCHER_NAMES = {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"}
_LINES_SHOWN = 12


def generate_isolated(engine: str, model: str, spec: GenerationSpec, prompts: Sequence[Prompt]) -> list[Response]:
    """Return `spec.n` responses to each prompt, in the order and with the seeds of `Generator.generate`.

    Raises:
        UserError: the child failed; the message ends with its last lines of output.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, answer, log = (Path(folder, name) for name in ("task.json", "answer.json", "log"))
        content = {"engine": engine, "model": model, "spec": spec.model_dump(), "prompts": list(prompts)}
        task.write_text(json.dumps(content), encoding="utf-8")
        # -P: a `random.py` in the current folder is not the library's.
        command = (sys.executable, "-P", "-m", "rewarded_lines.engines.isolated_engine", str(task), str(answer))
        others = {name for name in os.environ if name.startswith(_LAUNCHER)} | _LAUNCHER_NAMES
        environment = {name: value for name, value in os.environ.items() if name not in others}
        environment[DIE_WITH_PARENT] = str(os.getpid())
        with log.open("wb") as output:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_SHOWN:]
            raise fail(
                f"sampling responses failed with exit code {code}",
                where=f"{model}, engine {engine}",
                got="\n    ".join(["the last lines it printed:", *lines]),
                remedy="pass --sampling_engine hf" if engine == "vllm" else "",
            )
        found = json.loads(answer.read_text(encoding="utf-8"))
        return [Response(**{**one, "tokens": tuple(one["tokens"])}) for one in found]


def _answer(task: Path, answer: Path) -> None:
    """Generate the responses of a task, in the child process."""
    die_with_parent()
    content = json.loads(task.read_text(encoding="utf-8"))
    spec = GenerationSpec(**content["spec"])
    generator = load_generator(content["engine"], content["model"], spec, content["prompts"])
    try:
        responses = [asdict(response) for response in generator.generate(content["prompts"], spec)[0]]
    finally:
        generator.close()
    answer.write_text(json.dumps(responses), encoding="utf-8")


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), Path(sys.argv[2]))
