"""Scores pairs with all rewards behind one cache; models take turns if memory is short."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import blake3

from rewarded_lines.config import decides
from rewarded_lines.data.prompts import Prompt, prompt_key
from rewarded_lines.data.rows import Row, row_text
from rewarded_lines.errors import Problem
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import free_all
from rewarded_lines.rewards.reward import Columns, Reward
from rewarded_lines.rewards.reward_memory import RewardMemory, held_models, staying, turns_told
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.score_checks import Pair, PairError, rows_failed
from rewarded_lines.trace import span

# Pairs between two writes to the cache. A model needs many texts of like length for full batches.
_MODEL_CHUNK = 1024
_FUNCTION_CHUNK = 256
_REMEDY = (
    "run it again: all other scores are kept, only these are asked for; or say `missing: leave_out` in the reward's "
    "declaration, and a sweep goes on without them"
)
# A prompt, a response, and the columns of the prompt's row.
Item = tuple[Prompt, str, Row]


class Scorer:
    """Rewards behind one cache.

    Attributes:
        seconds: time spent in `score` so far.
        failed: by reward, how many responses of the last call have no score because the reward failed on them.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        declarations: Mapping[str, RewardSpec],
        cache: ScoreCache,
        offload: str = "auto",
        progress: Progress = SILENT,
        memory: RewardMemory | None = None,
    ) -> None:
        """Take charge of the rewards and the cache; `close` frees both.

        `offload` says whether models leave memory after scoring the pairs of a call: "always", "never", or "auto",
        where the largest take turns if those needed do not fit together. `progress` is told who takes turns.
        """
        self._rewards = dict(rewards)
        self._keys = {name: reward_key(reward, declarations[name]) for name, reward in rewards.items()}
        self._cache = cache
        self._offload = offload
        self._progress, self._memory, self._told = progress, memory or RewardMemory(), False
        self._leave_out = {name for name in rewards if declarations[name].missing == "leave_out"}
        self.seconds = 0.0
        self.failed = dict.fromkeys(rewards, 0)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None
    ) -> dict[str, list[float]]:
        """Return every reward's scores in order; after a failure, the cache keeps those that came.

        A score is NaN where a reward abstains, or fails and the project says `missing: leave_out`. `columns` are the
        further columns of each prompt's row.
        """
        started = time.perf_counter()
        self.failed = dict.fromkeys(self._rewards, 0)
        try:
            return self._score(list(zip(prompts, responses, columns or [{}] * len(prompts), strict=True)))
        finally:
            self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Free every reward, and close the cache."""
        free_all(self._rewards.values())
        self._cache.close()

    def _score(self, items: Sequence[Item]) -> dict[str, list[float]]:
        pairs = {name: _pairs(reward, items) for name, reward in self._rewards.items()}
        known = {name: self._cache.get(key, pairs[name]) for name, key in self._keys.items()}
        missing = {name: _first_places(own, known[name]) for name, own in pairs.items()}
        missing = {name: places for name, places in missing.items() if places}
        stay = self._staying(list(missing))
        for names in self._together(missing):
            shared = id(self._rewards[names[0]].shared)
            self._rest(stay | {shared})
            try:
                for name, scores in self._computed({name: missing[name] for name in names}, items):
                    known[name] |= scores
            finally:
                self._rest(stay)
        return {name: [scores[pair] for pair in pairs[name]] for name, scores in known.items()}

    def _together(self, names: Iterable[str]) -> list[list[str]]:
        """Return the names of rewards in groups that share what is in memory."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name in names:
            groups[id(self._rewards[name].shared)].append(name)
        return list(groups.values())

    def _computed(
        self, missing: Mapping[str, dict[Pair, int]], items: Sequence[Item]
    ) -> Iterator[tuple[str, dict[Pair, float]]]:
        """Yield scores of each reward's missing pairs as they come; the cache keeps them first.

        Rewards on one model take turns in each chunk, so that the model reads it once.
        """
        first = self._rewards[next(iter(missing))]
        wanted = list({pair: None for places in missing.values() for pair in places})
        if first.size:
            wanted.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        size = max(1, len(wanted)) if first.streams else _MODEL_CHUNK if first.size else _FUNCTION_CHUNK
        failed: dict[str, dict[Pair, Problem]] = defaultdict(dict)
        for start in range(0, len(wanted), size):
            for name, places in missing.items():
                chunk = [pair for pair in wanted[start : start + size] if pair in places]
                self._tell(name, start, len(wanted))
                if not chunk:
                    continue
                with span(f"score {name}", pairs=len(chunk)):
                    for found in self._streamed(name, chunk, places, items):
                        failed[name] |= {pair: one for pair, one in found.items() if isinstance(one, Problem)}
                        yield name, {pair: one for pair, one in found.items() if not isinstance(one, Problem)}
        for name, lost in failed.items():
            if lost:
                yield name, self._without(name, lost, items)

    def _streamed(
        self, name: str, chunk: Sequence[Pair], places: Mapping[Pair, int], items: Sequence[Item]
    ) -> Iterator[dict[Pair, float | Problem]]:
        """Yield what a reward gives for a chunk of pairs, as it comes; the cache keeps scores first."""
        key, done = self._keys[name], 0
        prompts, responses, columns = zip(*(items[places[pair]] for pair in chunk), strict=True)
        try:
            for found in self._rewards[name].stream(prompts, responses, columns):
                self._keep(key, {chunk[at]: one for at, one in found.items() if not isinstance(one, Problem)})
                done += len(found)
                if self._rewards[name].streams:
                    self._tell(name, done, len(chunk))
                yield {chunk[at]: one for at, one in found.items()}
        except PairError as error:
            self._keep(key, {chunk[index]: score for index, score in error.known.items()})
            raise PairError(error.problem, places[chunk[error.index]], error.pair) from error

    def _tell(self, name: str, done: int, total: int) -> None:
        self._progress.start(f"scoring {name}: {done:,} of {total:,} responses", counted=True)

    def _keep(self, key: str, scores: Mapping[Pair, float]) -> None:
        try:
            self._cache.put(key, scores)
        except KeyboardInterrupt:
            # It undid the write. These scores may have been paid for.
            self._cache.put(key, scores)
            raise

    def _without(self, name: str, failed: Mapping[Pair, Problem], items: Sequence[Item]) -> dict[Pair, float]:
        """Return NaN for pairs that a reward failed on, which the cache does not keep; or refuse them."""
        pairs = _pairs(self._rewards[name], items)
        lost = {at: failed[pair] for at, pair in enumerate(pairs) if pair in failed}
        if name not in self._leave_out:
            raise rows_failed(name, lost, [item[0] for item in items], [item[1] for item in items], _REMEDY)
        self.failed[name] = len(lost)
        return dict.fromkeys(failed, math.nan)

    def _rest(self, stay: Container[int]) -> None:
        """Let all models rest but those that share what is in `stay`."""
        for reward in self._rewards.values():
            if reward.size and reward.loaded and id(reward.shared) not in stay:
                reward.rest()

    def _staying(self, names: Sequence[str]) -> set[int]:
        """Return what stays in memory between uses: all models that nobody needs, and those that fit beside."""
        if self._offload == "always":
            return set()
        every = held_models(self._rewards.values())
        stay = {id(one.shared) for models in every.values() for one in models}
        needed = {id(self._rewards[name].shared) for name in names}
        for there in every.values() if self._offload == "auto" else ():
            models = {one: names for one, names in there.items() if one.loaded or id(one.shared) in needed}
            if all(one.loaded for one in models if id(one.shared) in needed):
                # Loaded models need no more memory.
                continue
            kept = staying(list(models), self._memory)
            stay -= {id(one.shared) for one in models if one not in kept}
            if len(kept) < len(models) and not self._told:
                self._told = True
                self._progress.tell(turns_told(models, kept))
        return stay


def _pairs(reward: Reward, items: Sequence[Item]) -> list[Pair]:
    """Return what decides each item's score: the columns only if the reward reads some."""
    pairs: list[Pair] = []
    for prompt, response, row in items:
        read = reward.reads(row)
        columns = (row_text(read),) if read else ()
        pairs.append((prompt_key(prompt), response, *columns))
    return pairs


def _first_places(pairs: Sequence[Pair], known: Container[Pair]) -> dict[Pair, int]:
    """Return the first place of each pair that is not known."""
    places: dict[Pair, int] = {}
    for at, pair in enumerate(pairs):
        if pair not in known:
            places.setdefault(pair, at)
    return places


def reward_key(reward: Reward, spec: RewardSpec) -> str:
    """Return a hash of everything that decides a reward's scores: content, declaration, type of device, card.

    A function without a source file gets a new key each time, since its content is unknown.
    """
    content: dict[str, Any] = {
        "declaration": decides(spec),
        "device": reward.device.partition(":")[0],
        "fingerprint": reward.fingerprint or uuid.uuid4().hex,
    }
    if reward.device.startswith("cuda"):
        import torch

        # Kernels, and so the last bits of a score, differ between cards.
        content["card"] = torch.cuda.get_device_name(reward.device)
    return str(blake3.blake3(json.dumps(content, sort_keys=True).encode()).hexdigest())
