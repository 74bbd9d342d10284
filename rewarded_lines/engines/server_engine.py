"""A vLLM server as an engine: it serves the SFT model and takes merged adapters at run time."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, cast

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.adapter_folders import AdapterFolders, AdapterGenerator, adapted_layers
from rewarded_lines.engines.base import Pairs, Response, Tokens, Workload, seeded_rows
from rewarded_lines.engines.http_answers import HttpAnswer, HttpFailure
from rewarded_lines.engines.http_client import HttpClient
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokenizers import load_tokens
from rewarded_lines.engines.vllm_adapters import refuse_unserved, slot_rank
from rewarded_lines.engines.vllm_core import make_response, sampling_settings
from rewarded_lines.errors import UserError, fail
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.spec import MergeSpec

FOLDER = "REWARDED_LINES_ADAPTER_FOLDER"
_KEYS = ("REWARDED_LINES_API_KEY", "OPENAI_API_KEY")
_UNDER_WAY = 64
# A request may wait behind many others.
_TIMEOUT, _RETRIES = 600.0, 3
_SHOWN = 300


class ServerConnection:
    """A connection that several threads may use; every failure is a `UserError`."""

    def __init__(self, url: str, connections: int) -> None:
        """Connect to `url` (with or without /v1 at its end) and read which model the server has.

        Raises:
            UserError: there is no server, or its answer is not that of a vLLM server.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        name = next((name for name in _KEYS if os.environ.get(name)), "")
        key = os.environ.get(name, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = HttpClient(self.url, connections, _TIMEOUT, _RETRIES, headers, {name: key})
        try:
            self.model, self.room = self._served()
        except BaseException:
            self.close()
            raise

    def complete(self, **request: Any) -> dict[str, Any]:
        """Return the one choice of a completion."""
        content = self.ask("POST", "/v1/completions", request)
        choices = content.get("choices") if isinstance(content, dict) else None
        if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
            raise self.strange("/v1/completions", content)
        return choices[0]

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """Return the server's answer, JSON or text."""
        response = self.response(method, path, content)
        if response.status != 200:
            key = f"set {_KEYS[0]} to the server's key"
            raise fail(
                "the server refuses a request",
                where=self.url + path,
                expected="status 200",
                got=self.described(response),
                remedy=key if response.status in (401, 403) else "look into the server's log",
            )
        try:
            return response.json()
        except json.JSONDecodeError:
            return response.text

    def response(self, method: str, path: str, content: Any = None) -> HttpAnswer:
        """Return the response of any status; retry if the connection fails or the server is busy."""
        try:
            return self._client.ask(method, path, content)
        except HttpFailure as error:
            raise fail(
                "the server cannot be reached",
                where=self.url,
                expected="an OpenAI-compatible server",
                got=f"{error.words} ({_RETRIES + 1} attempts)",
                remedy="start it (`vllm serve MODEL --enable-lora …`), or wait until it has loaded its model",
            ) from error

    def described(self, response: HttpAnswer) -> str:
        """Return status and message of a response, for an error."""
        return self._client.described(response)

    def strange(self, path: str, content: Any) -> UserError:
        """Return the error for an answer that is not that of a vLLM server."""
        return fail(
            "the server does not answer as vLLM's does",
            where=self.url + path,
            expected="vLLM's OpenAI-compatible server, as of `vllm serve`",
            got=str(content)[:_SHOWN],
            remedy="name the URL of such a server, without a path",
        )

    def close(self) -> None:
        """End all connections."""
        self._client.close()

    def _served(self) -> tuple[str, int | None]:
        """Return the base model's name, and the largest number of tokens of a sequence."""
        content = self.ask("GET", "/v1/models")
        try:
            own = next(card for card in content["data"] if not card.get("parent"))
            room = own.get("max_model_len")
            return str(own["id"]), room if isinstance(room, int) else None
        except (AttributeError, LookupError, StopIteration, TypeError) as error:
            raise self.strange("/v1/models", content) from error


class RemoteGenerator(AdapterGenerator):
    """Requests go to the server as tokens, many at a time.

    Merged adapters are written to a folder that the server must see under the same path: a temporary one, or
    `REWARDED_LINES_ADAPTER_FOLDER` on a shared disk. After their answers they are unloaded and removed. Start the
    server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and `--enable-lora --max-lora-rank N`; on a CPU add
    `--lora-target-modules` with the adapted layers, or vLLM 0.27 fails to return probabilities. The key comes from
    REWARDED_LINES_API_KEY or OPENAI_API_KEY. Nothing checks that the server's base is the SFT model.
    """

    at_once = 8

    def __init__(self, url: str, work: Workload) -> None:
        """Connect to the server at `url`, and load one merged adapter on trial; see `load_generator`.

        Raises:
            UserError: no such server, it refuses the adapters, or its sequences are too short.
        """
        self._plan = cast(AdapterPlan | None, work.plan)
        if self._plan is not None:
            refuse_unserved(self._plan, url)
            slot_rank(self._plan, url)
        self._tokenizer, self._ends, longest = load_tokens(work)
        self._server = ServerConnection(url, _UNDER_WAY)
        self._pool = ThreadPoolExecutor(_UNDER_WAY)
        try:
            self._check_room(longest)
            if self._plan is not None:
                place = os.environ.get(FOLDER)
                self._folders = AdapterFolders(self._plan, Path(place).expanduser().absolute() if place else None)
                self._try_adapters(self._plan, longest)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `Generator.close`. The server itself keeps running."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._server.close()
        if self._folders is not None:
            self._folders.close()

    def _generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, loaded: Sequence[str | None]
    ) -> list[list[Response]]:
        rows = seeded_rows(self.encode(prompts), spec)
        found: dict[str | None, list[Response]] = {}
        # Base requests go first and apart: in a batch that fills all slots, vLLM applies an adapter to them.
        for group in ([None] if None in loaded else [], [name for name in loaded if name is not None]):
            asked = [(name, row, seed) for name in group for row, seed in rows]
            # A failure cancels the requests that wait.
            made = self._pool.map(lambda one: self._answer(spec, *one), asked)
            found |= {name: list(islice(made, len(rows))) for name in group}
        return [found[name] for name in loaded]

    def _answer(self, spec: GenerationSpec, name: str | None, row: Tokens, seed: int) -> Response:
        reader = ResponseReader.of(self._tokenizer, self._ends, spec)
        choice = self._server.complete(
            model=name or self._server.model,
            prompt=list(row),
            **sampling_settings(spec, seed, reader) | {"top_k": spec.top_k or -1},
            # The server's own generation_config.json sets whatever a request does not.
            presence_penalty=0.0,
            frequency_penalty=0.0,
            return_token_ids=True,
        )
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(logprobs, list) or len(tokens) != len(logprobs):
            raise self._server.strange("/v1/completions", choice)
        return make_response(reader, row, tokens, logprobs, choice.get("finish_reason"))

    def _logprobs(self, pairs: Pairs, loaded: str | None) -> list[float]:
        return list(self._pool.map(lambda pair: self._score(loaded, *pair), pairs))

    def _score(self, name: str | None, head: Tokens, tail: Tokens) -> float:
        row, model = [*head, *tail], name or self._server.model
        choice = self._server.complete(model=model, prompt=row, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        found = choice.get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(row):
            raise self._server.strange("/v1/completions", choice)
        return float(sum(one[str(token)]["logprob"] for one, token in zip(found[len(head) :], tail, strict=True)))

    def _load(self, folder: Path) -> str:
        name, path = f"rewarded-lines-{secrets.token_hex(8)}", "/v1/load_lora_adapter"
        response = self._server.response("POST", path, {"lora_name": name, "lora_path": str(folder)})
        if response.status == 200:
            return name
        raise fail(
            "the server does not take merged adapters",
            where=self._server.url + path,
            expected="status 200",
            got=self._server.described(response),
            remedy=f"start it with {self._settings()}; if it runs elsewhere, set {FOLDER} to a folder that it sees "
            f"under the same path (now {folder.parent})",
        )

    def _unload(self, name: str) -> None:
        # An error here would hide the error that ended the block.
        with suppress(UserError):
            self._server.response("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def _settings(self) -> str:
        """Return how a server must be started for the adapters of the plan."""
        assert self._plan is not None
        rank, layers = slot_rank(self._plan, self._server.url), " ".join(adapted_layers(self._plan))
        command = f"--enable-lora --max-lora-rank {rank} --lora-target-modules {layers}"
        return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and {command}"

    def _try_adapters(self, plan: AdapterPlan, length: int) -> None:
        """Load one merged adapter, then each kind of its layers alone, and check that answers change.

        vLLM silently ignores layers that are not among its --lora-target-modules.
        """
        # Large enough to change answers in 16 bits.
        trial = MergeSpec((8.0,) * len(plan.policies), 1.0, 0.0)
        with self._loaded([trial]):
            pass
        greedy = GenerationSpec(temperature=0.0, max_tokens=1)
        # Several different tokens: attention to one token, or to equal ones, ignores queries and keys.
        row = range(3, 3 + min(8, length - 1))
        for layer in adapted_layers(plan):
            with self._loaded([None, trial], layer) as names:
                plain, changed = (self._answer(greedy, name, row, 0) for name in names)
            if plain.logprob == changed.logprob and not _is_zero(plan, layer):
                raise fail(
                    f"the server leaves out the layers {layer} of adapters",
                    where=self._server.url,
                    expected="answers that change with them",
                    remedy=f"start it with {self._settings()}",
                )

    def _check_room(self, length: int) -> None:
        room = self._server.room
        if room is not None and room < length:
            raise fail(
                "the server holds shorter sequences than are needed",
                where=f"{self._server.url}: {self._server.model}",
                expected=f"at least {length} tokens (prompt, response, and one)",
                got=f"{room} (its max_model_len)",
                remedy=f"start it with --max-model-len {length}, or shorten prompts or generation.max_tokens",
            )


def _is_zero(plan: AdapterPlan, layer: str) -> bool:
    """Return whether B is zero in all modules whose names end with `layer`: no policy changes them."""
    return not any(
        plan.adapters[index].read(module.b.name).any()
        for modules in plan.only(layer).modules.values()
        for index, module in modules.items()
    )
