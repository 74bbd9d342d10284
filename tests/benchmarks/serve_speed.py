"""Requests of many λ to one server: mixed throughput, the time of a λ never seen, a burst, memory.

    python tests/benchmarks/serve_speed.py                    # needs what `make demo LORA=1` has made
    python tests/benchmarks/serve_speed.py --only mixed --project runs/other/rewarded-lines.yaml
    python tests/benchmarks/serve_speed.py --only new --url http://127.0.0.1:8000   # a server that runs already

The server is `rewarded-lines serve` of the project, with its own defaults. Requests are greedy. The burst's texts must
be those of `rewarded-lines sweep`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil
import yaml
from sweep_speed import ROOT, environment, row, say

DEMO = ROOT / "runs" / "demo-lora" / "rewarded-lines.yaml"
# The first one needs a server that has seen no λ.
PARTS = ("new", "burst", "mixed", "memory")
ROW = "lines"
NO_REWARD = "def none(prompts, responses):\n    return [0.0] * len(prompts)"
TOKENS = 40
AT_ONCE = 64
# Starting takes half a minute on two slow cores.
PATIENCE = 300.0


def main() -> None:
    """Measure what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (repeat)")
    parser.add_argument("--project", type=Path, default=DEMO)
    parser.add_argument("--url", help="a server that runs; without it one is started")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not options.project.is_file():
        sys.exit(f"no project {options.project}: run `make demo LORA=1` first")
    say("| what | ours | beside | ratio | wanted | ok |\n|:--|--:|--:|--:|--:|:--|")
    parts: dict[str, Callable[[Client], Any]] = {
        "mixed": lambda client: mixed(client, options.repeats),
        "new": new_places,
        "burst": burst,
        "memory": memory,
    }
    with served(options.project, options.url) as (url, process):
        asyncio.run(measured([parts[part] for part in options.only or PARTS], url, options.project, process))


async def measured(parts: Sequence[Callable[[Client], Any]], url: str, project: Path, process: Any) -> None:
    """Run parts with connections to the server."""
    limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=limit, timeout=aiohttp.ClientTimeout(PATIENCE)) as session:
        client = Client(session, project, process)
        await client.start()
        for part in parts:
            await part(client)


@contextlib.contextmanager
def served(project: Path, url: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the address of a server, and its process if it was started here."""
    if url:
        yield url, None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("rewarded-lines")),
        "serve",
        "--config",
        str(project),
        "--port",
        str(port),
    ]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=subprocess.STDOUT)
        try:
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        except BaseException:
            said.seek(0)
            say(said.read()[-3000:])
            raise
        finally:
            process.terminate()
            process.wait()


class Client:
    """Sends requests, and knows the server's base, policies and prompts."""

    def __init__(self, session: aiohttp.ClientSession, project: Path, process: psutil.Process | None) -> None:
        """Read the project's prompts."""
        self.session, self.project, self.process = session, project, process
        content = yaml.safe_load(project.read_text())
        lines = (project.parent / content["prompts"]["file"]).read_text(encoding="utf-8").splitlines()
        self.prompts: list[str] = [json.loads(line)["prompt"] for line in lines]

    async def start(self) -> None:
        """Wait until the server answers, then ask what it serves."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with self.session.get("/preferences") as answer:
                    self.offered = await answer.json()
                    break
            if time.monotonic() > deadline or (self.process and self.process.status() == psutil.STATUS_ZOMBIE):
                sys.exit("the server did not start")
            await asyncio.sleep(0.5)
        self.base = self.offered["base"]
        async with self.session.get("/health") as answer:
            answer.raise_for_status()

    def places(self, count: int) -> list[str]:
        """Return the names of models at so many λ, evenly from 0 to 1, of two policies."""
        return [f"{ROW}@{index / (count - 1):g}" for index in range(count)]

    async def ask(self, model: str, prompt: str, **more: Any) -> tuple[str, dict[str, Any]]:
        """Return the name of the model that answered, and the answer."""
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}
        async with self.session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                sys.exit(f"{model}: {answer.status} {await answer.text()}")
            return answer.headers.get("x-rewarded-lines-model", model), await answer.json()

    async def throughput(self, models: Sequence[str]) -> float:
        """Return the tokens per second of four times 64 requests, 64 at once, their models in turn."""
        gate, count = asyncio.Semaphore(AT_ONCE), 4 * AT_ONCE

        async def one(model: str, prompt: str) -> None:
            async with gate:
                await self.ask(model, prompt, ignore_eos=True)

        asked = list(islice(zip(cycle(models), cycle(self.prompts), strict=False), count))
        began = time.perf_counter()
        await asyncio.gather(*(one(*pair) for pair in asked))
        return count * TOKENS / (time.perf_counter() - began)

    async def first_token(self, model: str) -> float:
        """Return the seconds until the first token."""
        body = {"model": model, "prompt": self.prompts[0], "max_tokens": 2, "temperature": 0, "stream": True}
        began = time.perf_counter()
        async with self.session.post("/v1/completions", json=body) as answer:
            answer.raise_for_status()
            await answer.content.readany()
            seconds = time.perf_counter() - began
            await answer.read()
        return seconds


async def mixed(client: Client, repeats: int) -> None:
    """Compare a batch of 11 λ with one of a single λ, and with one of the base."""
    kinds = {"mixed": client.places(11), "one": [f"{ROW}@0.5"], "base": [client.base]}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for names in kinds.values():
        await client.throughput(names)
    for turn in range(repeats):
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            found[kind].append(await client.throughput(kinds[kind]))
    many, one, base = (median(found[kind]) for kind in kinds)
    what = f"{AT_ONCE} requests at once: 11 λ in the batch, beside"
    row(f"{what} one λ [tokens/s]", f"{many:.0f}", f"{one:.0f}", many / one, 0.7, at_most=False)
    say(f"| {what} the base alone [tokens/s] | {many:.0f} | {base:.0f} | {many / base:.3g} | | |")


async def new_places(client: Client) -> None:
    """Compare the first token at a λ that the server has not seen with the next one at the same λ."""
    await client.first_token(client.base)
    names = client.places(101)[5:95:4]
    fresh = [await client.first_token(name) for name in names]
    known = [await client.first_token(name) for name in names[-4:] for _ in range(5)]
    times = [1000 * median(seconds) for seconds in (fresh, known)]
    longest = f"longest of {len(names)}: {1000 * max(fresh):.0f} ms"
    what = f"first token at a λ never seen ({longest}), beside one that is kept"
    row(what, f"{times[0]:.1f} ms", f"{times[1]:.1f} ms", times[0] / times[1], 100, at_most=True)


async def burst(client: Client) -> None:
    """Ask for 505 answers at 101 λ and 5 of the base at once; compare every text with the sweep's."""
    texts = await asyncio.to_thread(swept, client.project)
    began = time.perf_counter()
    answers = await asyncio.gather(*(client.ask(*key) for key in texts))
    seconds = time.perf_counter() - began
    said = [(answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) for _, answer in answers]
    wrong = sum(one != other for one, other in zip(said, texts.values(), strict=True))
    strange = sum(model != name for (name, _), (model, _) in zip(texts, answers, strict=True) if name != client.base)
    say(f"| a burst of {len(texts)} requests over 101 λ and the base, greedy | {seconds:.1f} s | | | | |")
    row("texts of the burst that are not the sweep's", str(wrong), str(len(texts)), wrong / len(texts), 0, at_most=True)
    row("answers by another model than asked", str(strange), str(len(texts)), strange / len(texts), 0, at_most=True)


def swept(project: Path) -> dict[tuple[str, str], tuple[str, int]]:
    """Return the greedy text of `sweep` and its tokens for (model, prompt), at 101 λ and the base, five prompts."""
    content = yaml.safe_load(project.read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "project.yaml")
        small = {
            "base": str(project.parent / content["base"]),
            "policies": {name: str(project.parent / policy) for name, policy in content["policies"].items()},
            "rewards": {"none": {"function": "rewards.py:none"}},
            "prompts": {"file": str(project.parent / content["prompts"]["file"]), "limit": 5},
            "generation": {"temperature": 0, "max_tokens": TOKENS},
            "sweep": {"methods": [ROW]},
        }
        path.write_text(yaml.safe_dump(small, sort_keys=False))
        # The sweep is made for its texts.
        Path(folder, "rewards.py").write_text(f"{NO_REWARD}\n")
        program = str(Path(sys.executable).with_name("rewarded-lines"))
        command = [program, "sweep", "--config", str(path), "--out", f"{folder}/sweep", "--points", "101", "--quiet"]
        subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
        from rewarded_lines.evaluator.records import load_run

        points = load_run(Path(folder, "sweep")).points
    base = content["base"]
    return {
        (f"{ROW}@{point.spec.lam:g}" if point.spec.method == ROW else base, prompt): (text, int(tokens))
        for point in points
        for prompt, text, tokens in zip(point.prompts, point.responses, point.tokens, strict=True)
    }


async def memory(client: Client) -> None:
    """Compare the server's resident memory after 400 and after 2,000 models."""
    if client.process is None:
        return
    names = [f"{name};alpha={alpha / 100:g}" for alpha in range(101, 121) for name in client.places(101)][:2000]
    sizes = []
    for few in (names[:400], names[400:]):
        for start in range(0, len(few), 8):
            await asyncio.gather(
                *(client.ask(name, client.prompts[0], max_tokens=1) for name in few[start : start + 8])
            )
        tree = [client.process, *client.process.children(recursive=True)]
        sizes.append(sum(process.memory_info().rss for process in tree) / 1e6)
    what = "resident memory of all processes after 2,000 models, beside 400"
    row(what, f"{sizes[1]:.0f} MB", f"{sizes[0]:.0f} MB", sizes[1] / sizes[0], 1.02, at_most=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
