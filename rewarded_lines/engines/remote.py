"""A server as an engine: one of vLLM's, which serves the SFT model and takes adapters at run time."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.adapter_folders import AdapterFolders, adapted_layers, changes_nothing
from rewarded_lines.engines.base import Model, Response, Tokens, prompt_seed
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.server import Server, describe
from rewarded_lines.engines.tokens import (
    end_tokens,
    load_config,
    load_generation_config,
    load_tokenizer,
    longest_sequence,
)
from rewarded_lines.engines.vllm_adapters import chunks, refuse_unserved, slot_rank
from rewarded_lines.engines.vllm_core import make_response
from rewarded_lines.errors import UserError, fail
from rewarded_lines.planning.adapter_plan import AdapterPlan
from rewarded_lines.rules.spec import MergeSpec

FOLDER = "REWARDED_LINES_ADAPTER_FOLDER"
_UNDER_WAY = 64
# A server's own generation_config.json counts wherever a request leaves something open.
_PLAIN = {"presence_penalty": 0.0, "frequency_penalty": 0.0}


class RemoteGenerator:
    """Requests go to the server as tokens, many at a time.

    Merged adapters are written to a folder that the server must be able to read under the same path: a temporary one
    of this machine, or one in `REWARDED_LINES_ADAPTER_FOLDER`, on a disk that both share for instance. They are
    unloaded and removed when they have answered. The server is started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and
    `--enable-lora --max-lora-rank N`; on a CPU also with `--lora-target-modules` naming the adapted layers, without
    which vLLM 0.27 fails when it is asked for probabilities. A key is read from REWARDED_LINES_API_KEY or
    OPENAI_API_KEY. That the server's base is the SFT model is not checked.
    """

    at_once = 8

    def __init__(
        self,
        url: str,
        model: str,
        spec: GenerationSpec,
        prompts: Sequence[Prompt],
        *,
        plan: AdapterPlan | None = None,
        longest: int = 0,
    ) -> None:
        """Connect; see `load_generator`. One merged adapter is loaded on trial.

        Args:
            url: of the server.
            model: the SFT model's folder or Hub id, for its tokenizer.
            spec: chat template and response length.
            prompts, longest: see `load_generator`.
            plan: of adapters.

        Raises:
            UserError: there is no such server, it takes no adapters or not these, or its sequences are too short.
        """
        if plan is not None:
            refuse_unserved(plan, url)
            slot_rank(plan, url)
        self.swap_seconds = 0.0
        self._tokenizer = load_tokenizer(model, spec)
        self._ends = end_tokens(self._tokenizer, load_generation_config(model))
        length = longest_sequence(self._tokenizer, load_config(model), model, spec, prompts, longest)
        self._plan = plan
        self._server = Server(url, _UNDER_WAY)
        self._pool = ThreadPoolExecutor(_UNDER_WAY)
        self._folders: AdapterFolders | None = None
        self._name, self._count = f"rewarded-lines-{secrets.token_hex(4)}", 0
        try:
            self._check_room(length)
            if self._plan is not None:
                place = os.environ.get(FOLDER)
                self._folders = AdapterFolders(self._plan, Path(place).expanduser().absolute() if place else None)
                self._try_adapters(self._plan, length)
        except BaseException:
            self.close()
            raise

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Generator.encode`."""
        return encode(self._tokenizer, prompts)

    def generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, models: Sequence[Model] = (None,)
    ) -> list[list[Response]]:
        """See `Generator.generate`."""
        answers: list[list[Response]] = []
        for chunk in self._chunks(models):
            with self._adapters(chunk) as names:
                answers += self._generate(prompts, spec, names)
        return answers

    def logprobs(self, pairs: Sequence[tuple[Tokens, Tokens]], model: Model = None) -> list[float]:
        """See `Generator.logprobs`."""
        with self._adapters([model]) as (name,):
            return self._all([partial(self._score, name, head, tail) for head, tail in pairs])

    def close(self) -> None:
        """See `Generator.close`: the connections end, the server goes on without our adapters."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._server.close()
        if self._folders is not None:
            self._folders.close()

    def _generate(self, prompts: Sequence[Prompt], spec: GenerationSpec, names: Sequence[str]) -> list[list[Response]]:
        rows = [(row, index, k) for index, row in enumerate(self.encode(prompts)) for k in range(spec.n)]
        found: dict[str, list[Response]] = {}
        # Requests without an adapter go by themselves: in a batch where others take all slots, vLLM gives them one.
        base = [name for name in names if name == self._server.model][:1]
        for group in (base, [name for name in names if name != self._server.model]):
            asked = [
                partial(self._answer, name, row, prompt_seed(spec, index, k), spec)
                for name in group
                for row, index, k in rows
            ]
            made = self._all(asked)
            for place, name in enumerate(group):
                found[name] = made[place * len(rows) : (place + 1) * len(rows)]
        return [found[name] for name in names]

    def _answer(self, name: str, row: Tokens, seed: int, spec: GenerationSpec) -> Response:
        reader = ResponseReader.of(self._tokenizer, self._ends, spec)
        choice = self._server.complete(
            model=name,
            prompt=list(row),
            max_tokens=spec.max_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k or -1,
            min_p=spec.min_p,
            repetition_penalty=spec.repetition_penalty,
            stop=list(spec.stop),
            stop_token_ids=sorted(reader.ends),
            seed=seed,
            logprobs=0,
            return_token_ids=True,
            **_PLAIN,
        )
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(logprobs, list) or len(tokens) != len(logprobs):
            raise self._server.strange("/v1/completions", choice)
        return make_response(reader, row, tokens, logprobs, choice.get("finish_reason"))

    def _score(self, name: str, head: Tokens, tail: Tokens) -> float:
        row = [*head, *tail]
        choice = self._server.complete(model=name, prompt=row, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        said = choice.get("prompt_logprobs")
        if not isinstance(said, list) or len(said) != len(row):
            raise self._server.strange("/v1/completions", choice)
        return float(sum(one[str(token)]["logprob"] for one, token in zip(said[len(head) :], tail, strict=True)))

    def _all(self, asked: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return what several requests give, in order; the first that fails calls off those that wait."""
        futures = [self._pool.submit(one) for one in asked]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _chunks(self, models: Sequence[Model]) -> Iterator[list[Model]]:
        return iter([list(models)]) if self._plan is None else chunks(self._plan, models, self.at_once)

    @contextmanager
    def _adapters(self, models: Sequence[Model], layer: str = "") -> Iterator[list[str]]:
        """Yield the name under which the server knows each model; adapters are unloaded afterwards."""
        started = time.perf_counter()
        wanted = [model for model in models if model is not None and not self._is_base(model)]
        written = self._folders.write(wanted, layer) if wanted and self._folders else []
        loaded: list[str] = []
        try:
            for folder in written:
                loaded.append(self._load(folder))
            self.swap_seconds += time.perf_counter() - started
            left = iter(loaded)
            yield [self._server.model if self._is_base(model) else next(left) for model in models]
        finally:
            # Whatever else went wrong is what the user should be told.
            with suppress(UserError):
                for name in loaded:
                    self._server.response("POST", "/v1/unload_lora_adapter", {"lora_name": name})
            if self._folders:
                self._folders.remove(written)

    def _is_base(self, model: Model) -> bool:
        if model is None:
            return True
        assert self._plan is not None, "without a plan there is only the SFT model"
        return changes_nothing(self._plan, model)

    def _load(self, folder: Path) -> str:
        """Have the server load an adapter; return its name there.

        Raises:
            UserError: it does not.
        """
        self._count += 1
        name, path = f"{self._name}-{self._count}", "/v1/load_lora_adapter"
        response = self._server.response("POST", path, {"lora_name": name, "lora_path": str(folder)})
        if response.status_code != httpx2.codes.OK:
            raise self._refused_adapter(folder, response)
        return name

    def _refused_adapter(self, folder: Path, response: httpx2.Response) -> UserError:
        return fail(
            "the server does not take merged adapters",
            where=f"{self._server.url}/v1/load_lora_adapter",
            expected="status 200",
            got=describe(response),
            remedy=f"start it with {self._settings()}; if it runs elsewhere, set {FOLDER} to a folder that it sees "
            f"under the same path (now {folder.parent})",
        )

    def _settings(self) -> str:
        """Return how a server must be started for the adapters of the plan."""
        assert self._plan is not None
        rank, layers = slot_rank(self._plan, self._server.url), " ".join(adapted_layers(self._plan))
        command = f"--enable-lora --max-lora-rank {rank} --lora-target-modules {layers}"
        return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and {command}"

    def _try_adapters(self, plan: AdapterPlan, length: int) -> None:
        """Load one merged adapter, and the layers of it that have a name in common, to see that each of them counts.

        A server that takes no adapters is found out before anything else is done, and so is one that leaves out
        layers in silence, as vLLM does with those that are not among its --lora-target-modules.

        Raises:
            UserError: it is such a server.
        """
        # Large enough for changes to be seen in 16 bits.
        trial = MergeSpec((8.0,) * len(plan.policies), 1.0, 0.0)
        with self._adapters([trial]):
            pass
        greedy = GenerationSpec(temperature=0.0, max_tokens=1)
        # Attention to one token, or to equal ones, does not depend on its queries and keys.
        row = range(3, 3 + min(8, length - 1))
        for layer in adapted_layers(plan):
            with self._adapters([None, trial], layer) as names:
                plain, changed = (self._answer(name, row, 0, greedy) for name in names)
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
    """Say whether no policy changes anything in the modules whose names end with `layer`: their B are zero."""
    return not any(
        plan.adapters[index].read(module.b.name).any()
        for modules in plan.only(layer).modules.values()
        for index, module in modules.items()
    )
