"""Probes of the doctor: what packages, libraries and the machine say of themselves, without a judgement.

An import may crash, hang, or print what it likes, so each library is imported in a child process.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarded_lines.processes import VLLM_SETTINGS

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_VISION = ("torchvision", "torchaudio", "torchcodec")
# vLLM takes 11 s to import on two slow cores and half a minute to answer, more where nothing is compiled yet.
_SECONDS = 300.0
_LONGEST = 160
_MEMORY_INFO = Path("/proc/meminfo")
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# Where the child writes its answer: stdout belongs to the libraries.
_ANSWER = "REWARDED_LINES_ANSWER"
_PROLOGUE = f"""
import json, os
def answer(**told):
    with open(os.environ[{_ANSWER!r}], "w", encoding="utf-8") as file:
        json.dump(told, file)
"""
_TORCH = """
import torch
cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
answer(cuda=torch.version.cuda, cards=cards)
"""
_TRANSFORMERS = "from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification"
# A model of random weights without a tokenizer. `device` is empty where vLLM finds neither a GPU nor its CPU build.
_VLLM = """
import tempfile, time, torch, vllm
from transformers import LlamaConfig
from vllm.platforms import current_platform
told = dict(version=vllm.__version__, device=current_platform.device_type)
answer(**told)
how = dict(dtype="float32", max_model_len=64, enforce_eager=True, load_format="dummy", skip_tokenizer_init=True)
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    how["gpu_memory_utilization"] = round(0.9 * free / total, 3)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
with tempfile.TemporaryDirectory() as folder:
    LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=64, **sizes).save_pretrained(folder)
    began = time.perf_counter()
    engine = vllm.LLM(folder, **how)
    seconds = round(time.perf_counter() - began, 1)
    sampling = vllm.SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
    engine.generate([{"prompt_token_ids": [1, 4, 5]}], sampling)
    answer(**told, seconds=seconds)
"""


def wanted(package: str, extra: str = "") -> list[Requirement]:
    """Return what an installed package requires on this machine, or what one of its extras adds."""
    from packaging.requirements import Requirement

    found = []
    for need in map(Requirement, requires(package) or []):
        always = need.marker is None or need.marker.evaluate({"extra": ""})
        added = need.marker is not None and not always and need.marker.evaluate({"extra": extra})
        if added if extra else always:
            found.append(Requirement(f"{need.name}{need.specifier}"))
    return found


def misfits(needs: list[Requirement]) -> list[tuple[Requirement, str]]:
    """Return the requirements that are not met, each with the version that is installed, "" for none."""
    pairs = [(need, installed(need.name)) for need in needs]
    return [(need, have) for need, have in pairs if not have or not need.specifier.contains(have, prereleases=True)]


def installed(package: str) -> str:
    """Return the version of an installed package, "" for none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def cuda_of_torch() -> str:
    """Return the CUDA version that torch was built for, "" for a CPU build, without importing torch."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else Path()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"^cuda\b.*'([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else ""


def try_torch() -> tuple[str, list[str], str]:
    """Import torch; return the CUDA version of its build, the GPUs that it sees, and why it failed."""
    told, failure = ask(_TORCH)
    return told.get("cuda") or "", told.get("cards", []), "" if told else failure


def try_transformers() -> str:
    """Import the classes that load models; return why that failed, "" if it did not."""
    return ask(_TRANSFORMERS)[1]


def try_vllm() -> tuple[str, str]:
    """Have vLLM answer with a tiny random model; return what it is and how long it took, or why it failed."""
    told, failure = ask(_VLLM)
    if not told:
        return "", f"does not import: {failure}"
    found = f"{told['version']} for {told['device']}"
    if not told["device"]:
        return "", f"{told['version']} finds neither a GPU nor its CPU build here"
    if "seconds" not in told:
        return "", f"{found}, but no engine starts: {failure}"
    return f"{found}; an engine was built in {told['seconds']} s and has answered", ""


def vision_misfits(thorough: bool) -> tuple[list[str], dict[str, str]]:
    """Return torch's sister packages that are installed, and why some of them do not fit torch.

    Args:
        thorough: import them, instead of comparing their metadata.
    """
    there = [name for name in _VISION if find_spec(name)]
    whys = {name: ask(f"import {name}")[1] if thorough else _vision_misfit(name) for name in there}
    return there, {name: why for name, why in whys.items() if why}


def _vision_misfit(name: str) -> str:
    have, torch = installed(name), installed("torch")
    if not have or not torch:
        return ""
    if wrong := [need for need, _ in misfits(wanted(name)) if need.name == "torch"]:
        return f"{have} needs {wrong[0]}, {torch} is installed"
    # PyPI's wheels of torchcodec have no CUDA in their version, and fit both builds.
    if name != "torchcodec" and have.endswith("+cpu") != torch.endswith("+cpu"):
        return f"only one of {have} and torch {torch} is a CPU build"
    return ""


def graphics_cards() -> list[str]:
    """Return the GPUs that the driver lists, by name and memory; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def free_memory() -> int | None:
    """Return the bytes that can be taken without swapping, within a container's limit."""
    known = []
    if _MEMORY_INFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines())
        known.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for path in _GROUP_LIMITS:
        if path.is_file() and (limit := path.read_text(encoding="ascii").strip()).isdecimal():
            known.append(int(limit))
    return min(known, default=None)


def refusal(folder: Path) -> str:
    """Return why no file can be made in a folder, or in the nearest one above it that exists; "" if one can."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__


def existing(path: Path) -> Path:
    """Return the path, or the nearest above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def hub_folder() -> Path:
    """Return where models of the Hub are kept; the Hub's own client reads the same variables."""
    home = Path(os.environ.get("HF_HOME") or user_cache() / "huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def user_cache() -> Path:
    """Return where the user's programs keep what they can make anew."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def ask(code: str, seconds: float = _SECONDS) -> tuple[dict[str, Any], str]:
    """Run Python code in a child process; return what it passed to `answer(name=value, ...)`, and why it failed.

    Args:
        code: to run. The current folder is not on its path: a `torch.py` there is not torch.
        seconds: after which the child and its own children are killed.

    Returns:
        The last answer, {} if there is none; and the failure in one line, "" if the code ran to its end.
    """
    with tempfile.NamedTemporaryFile(prefix="rewarded-lines-") as file, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROLOGUE + code],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, **VLLM_SETTINGS, _ANSWER: file.name},
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
            said.seek(0)
            failure = _last_words(said.read().decode("utf-8", "replace"), status) if status else ""
        except subprocess.TimeoutExpired:
            failure = f"no answer in {seconds:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        told: dict[str, Any] = {}
        with suppress(ValueError):
            told = json.loads(file.read().decode("utf-8"))
        return told, failure


def _last_words(text: str, status: int) -> str:
    """Return the last line of a traceback, or how the process ended."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Libraries print their own advice below the error.
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    last = (errors or lines or [f"exit code {status}"])[-1]
    return last if len(last) <= _LONGEST else f"{last[: _LONGEST - 1]}…"
