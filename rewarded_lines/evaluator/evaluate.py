"""Makes the records of points in this process, with one engine; `ray_cluster` does it on many machines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.data.prompts import Prompt, prompt_text
from rewarded_lines.engines.base import Generator, Model, Response, prompt_seed
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.missing_scores import too_few
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point, draft_path, point_path, whole_point, write_point
from rewarded_lines.evaluator.sweep_setup import Setup
from rewarded_lines.processes import give_back_memory
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.rewards.reward import SFT_RESPONSE, columns_of
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer
from rewarded_lines.rewards.scoring_ahead import ScoringAhead, Work, score_ahead
from rewarded_lines.trace import span

# Where weights are swapped, the SFT model returns after this many points or seconds.
# A killed run loses the points since then.
_POINTS_A_SPELL = 16
_SPELL_SECONDS = 20.0
_CACHE = "scores.sqlite"
# The value of a reward's `missing` that lets a sweep go on where the reward fails.
_LEAVE_OUT = "leave_out"
Keys = Mapping[PointSpec, str]
# A point's key and spec, its responses, and its sums over the control texts; its spec and what rewards see of it.
Made = tuple[str, PointSpec, list[Response], np.ndarray | None]
Judged = tuple[PointSpec, list[str]]
Finished = tuple[str, Point]
Result = TypeVar("Result")


class LocalEvaluator:
    """Generates and scores in this process, with one engine for all points.

    Attributes:
        width: how many points it works on at the same time.
    """

    width = 1

    def __init__(self, setup: Setup, folder: Path, also: Sequence[Prompt] = (), progress: Progress = SILENT) -> None:
        """Load nothing yet: the first point loads the engine and the reward models.

        `folder` keeps drafts (responses without scores) and cached scores. The engine also has
        room for the prompts `also`.
        """
        self.setup, self._folder = setup, folder
        self._also, self._progress = also, progress
        self._clock = {"engine": 0.0, "generate": 0.0, "score": 0.0}
        # Prompts, and the SFT model's responses to them.
        self._sft: tuple[list[Prompt], list[str]] | None = None

    def close(self) -> None:
        """Free engine and rewards."""
        ahead = self.__dict__.get("_ahead")
        if ahead:
            ahead.stop()
        for name in ("_generator", "_scorer"):
            if name in self.__dict__ or (ahead and name == "_scorer"):
                getattr(self, name).close()
        if ahead:
            ahead.join()

    def evaluate(self, setup: Setup, keys: Keys, missing: Iterable[str]) -> Iterator[Finished]:
        """Yield (key, point) for every key in `missing`, in batches that do not depend on what is missing.

        `keys` holds all points that belong together, in order; they decide the batches. Where scores are made beside
        the engine, those of a turn have the next turn's time.
        """
        late: deque[tuple[dict[str, Point], int]] = deque()
        for drafts in self._turns(setup, keys, set(missing)):
            late.append((drafts, self._ahead.added if self._ahead else 0))
            if self._ahead is None or len(late) > 1:
                yield from self._finished(setup, keys, *late.popleft())
        for drafts, number in late:
            yield from self._finished(setup, keys, drafts, number)

    def _finished(self, setup: Setup, keys: Keys, drafts: dict[str, Point], number: int) -> Iterator[Finished]:
        """Yield the points of drafts once the first `number` scored beside the engine are there; remove the drafts."""
        if self._ahead:
            self._progress.start("waiting for scores", counted=True)
            self._timed("score", partial(self._ahead.wait, number))
        for key, point in self._scored(setup, keys, drafts):
            yield key, point
            draft_path(self._folder, key).unlink(missing_ok=True)
        give_back_memory()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of building the engine, generating, swapping, and waiting for scores."""
        built = "_generator" in self.__dict__
        scored = self._clock["score"] + (self._scorer.seconds if "_scorer" in self.__dict__ else 0.0)
        swap = self._generator.swap_seconds if built else 0.0
        return {**self._clock, "generate": self._clock["generate"] - swap, "swap": swap, "score": scored}

    @cached_property
    def _scorer(self) -> Scorer:
        setup, cache = self.setup, ScoreCache(self._folder / _CACHE)
        how = setup.options.offload, self._progress, setup.reward_memory
        return Scorer(setup.rewards, setup.project.config.rewards, cache, *how)

    @cached_property
    def _ahead(self) -> ScoringAhead | None:
        declared = self.setup.project.config.rewards
        return score_ahead(self.setup.rewards, declared, self._folder / _CACHE, self._progress)

    @cached_property
    def _generator(self) -> Generator:
        self._progress.start("building the engine")
        made = self._timed("engine", lambda: self.setup.generator(self._also, self._progress.tell))
        for fact in made.told:
            self._progress.tell(fact)
        return made

    def _turns(self, setup: Setup, keys: Keys, wanted: set[str]) -> Iterator[dict[str, Point]]:
        """Yield the drafts of wanted points in turns; a missing draft makes its whole batch again.

        Where weights are swapped, a batch is one point, and the SFT model returns once for the KL of several.
        """
        specs = list({key: spec for spec, key in keys.items()}.items())
        size = self._generator.at_once
        batches = [specs[start : start + size] for start in range(0, len(specs), size)]
        left = deque(batch for batch in batches if any(key in wanted for key, _ in batch))
        most = _POINTS_A_SPELL if size == 1 else 1
        while left:
            began = time.perf_counter()
            waiting: list[list[Made]] = []
            drafts: dict[str, Point] = {}
            while left and len(waiting) + len(drafts) < most and time.perf_counter() - began < _SPELL_SECONDS:
                if self._ahead and self._ahead.failed:
                    break
                batch = left.popleft()
                todo = [key for key, _ in batch if key in wanted]
                found = {key: draft for key in todo if (draft := whole_point(draft_path(self._folder, key)))}
                if len(found) == len(todo):
                    drafts |= found
                    judged = [(draft.spec, draft.judged) for draft in found.values()]
                else:
                    waiting.append(self._made(setup, batch, todo))
                    judged = [(one[1], [each.judged for each in one[2]]) for one in waiting[-1] if one[0] in wanted]
                self._score_ahead(setup, keys, judged, drafts)
            # The KL needs the whole batch, too: its other sequences change the last bits.
            for made in waiting:
                drafts |= self._drafts(setup, made, wanted)
            yield drafts

    def _made(self, setup: Setup, batch: Sequence[tuple[str, PointSpec]], todo: Sequence[str]) -> list[Made]:
        """Generate a batch of points, and read the control texts with the points in `todo`."""
        models = [spec.model(list(setup.plan.policies)) for _, spec in batch]
        what = str(batch[0][1]) if len(batch) == 1 else f"{len(batch)} points together"
        self._progress.start(f"generating {what}", counted=True)
        answers = self._timed("generate", partial(self._generator.generate, setup.prompts, setup.generation, models))
        return [
            (key, spec, responses, self._control(setup, model) if key in todo else None)
            for (key, spec), responses, model in zip(batch, answers, models, strict=True)
        ]

    def _control(self, setup: Setup, model: Model) -> np.ndarray | None:
        """Return each control text's nats and predicted tokens, [texts, 2]."""
        if not setup.control:
            return None
        windows = setup.control_windows(self._generator.encode(setup.control_texts))
        pairs = [(head, tail) for _, head, tail in windows]
        logprobs = self._timed("generate", lambda: self._generator.logprobs(pairs, model))
        sums = np.zeros((len(setup.control_texts), 2))
        for (text, _, tail), logprob in zip(windows, logprobs, strict=True):
            sums[text] += (-logprob, len(tail))
        return sums

    def _log_ratios(self, setup: Setup, made: Sequence[Made]) -> list[np.ndarray]:
        """Return log π(y|x) − log π_SFT(y|x) of every response of these points."""
        heads = [head for head in self._generator.encode(setup.prompts) for _ in range(setup.generation.n)]
        pairs: list[tuple[Sequence[int], Sequence[int]]] = []
        for _, spec, responses, _ in made:
            if spec.method != SFT:
                pairs += zip(heads, (response.tokens for response in responses), strict=True)
        if pairs:
            what = made[0][1] if len(made) == 1 else f"{len(made)} points"
            self._progress.start(f"KL of {what}", counted=True)
        found = iter(self._timed("generate", lambda: self._generator.logprobs(pairs)) if pairs else [])
        ratios = []
        for _, spec, responses, _ in made:
            own = np.array([response.logprob for response in responses])
            base = own if spec.method == SFT else np.fromiter(islice(found, len(own)), float, len(own))
            ratios.append(own - base)
        return ratios

    def _drafts(self, setup: Setup, made: Sequence[Made], wanted: set[str]) -> dict[str, Point]:
        """Write the wanted drafts, since scoring may take long, and return them by key."""
        count, samples = len(setup.prompts), setup.generation.n
        index = np.repeat(np.arange(count), samples)
        texts = [prompt_text(prompt) for prompt in setup.prompts]
        seeds = [prompt_seed(setup.generation, i, k) for i in range(count) for k in range(samples)]
        drafts = {
            key: Point(
                spec=spec,
                prompts=[texts[i] for i in index],
                responses=[response.text for response in responses],
                seen=None if setup.generation.strip is None else [response.judged for response in responses],
                prompt_index=index.astype(np.int64),
                seeds=np.array(seeds, dtype=np.int64),
                tokens=np.array([len(response.tokens) for response in responses], dtype=np.int64),
                ended=np.array([response.ended for response in responses]),
                kl=ratios,
                control=control,
            )
            for (key, spec, responses, control), ratios in zip(made, self._log_ratios(setup, made), strict=True)
            if key in wanted
        }
        for key, draft in drafts.items():
            write_point(draft_path(self._folder, key), draft)
        return drafts

    def _scored(self, setup: Setup, keys: Keys, drafts: Mapping[str, Point]) -> Iterator[Finished]:
        """Yield the points with scores; a UserError for a point with too few, whose draft stays.

        One call scores all, which fills batches better. Where a reward may fail, each point has its own call, so that
        its record has its own count of failures.
        """
        alone = any(one.missing == _LEAVE_OUT for one in setup.project.config.rewards.values())
        for some in [{key: draft} for key, draft in drafts.items()] if alone else [drafts]:
            responses = [response for draft in some.values() for response in draft.judged]
            found = self._scorer.score(*self._asked(setup, keys, responses, drafts))
            scores = {name: np.array(found[name], dtype=np.float64) for name in setup.rewards}
            failed = {name: count for name, count in self._scorer.failed.items() if count}
            start = 0
            for key, draft in some.items():
                own = slice(start, start + len(draft.responses))
                point = replace(draft, scores={name: values[own] for name, values in scores.items()}, failed=failed)
                if problems := too_few(str(point.spec), point.scores, len(setup.prompts), point.missing):
                    raise UserError(problems)
                yield key, point
                start = own.stop

    def _score_ahead(self, setup: Setup, keys: Keys, judged: Sequence[Judged], drafts: Mapping[str, Point]) -> None:
        """Let points be scored while the engine goes on; earlier drafts, too, since one thread alone uses a reward."""
        if self._ahead is None:
            return
        for spec, responses in judged:
            self._sft = (setup.prompts, responses) if spec.method == SFT else self._sft
            self._ahead.add(self._asked(setup, keys, responses, drafts))

    def _asked(self, setup: Setup, keys: Keys, responses: Sequence[str], drafts: Mapping[str, Point]) -> Work:
        """Return what rewards get of some points' responses: the prompts, the responses, and the columns."""
        points = len(responses) // (len(setup.rows) * setup.generation.n)
        rows = [row for row in setup.rows for _ in range(setup.generation.n)] * points
        columns = columns_of(rows)
        if any(reward.reads_sft for reward in setup.rewards.values()):
            sft = self._sft_responses(setup, keys, drafts) * points
            columns = [{**row, SFT_RESPONSE: text} for row, text in zip(columns, sft, strict=True)]
        return [row["prompt"] for row in rows], responses, columns

    def _sft_responses(self, setup: Setup, keys: Keys, drafts: Mapping[str, Point]) -> list[str]:
        """Return the SFT model's responses as rewards see them: those of its point, or else generated alone."""
        if self._sft is None or self._sft[0] != setup.prompts:
            # Of a search, the SFT model's point is not among the keys.
            key = keys.get(PointSpec(SFT)) or setup.key(PointSpec(SFT))
            places = point_path(self._folder, key), draft_path(self._folder, key)
            point = drafts.get(key) or next(filter(None, map(whole_point, places)), None)
            if point is None:
                self._progress.start("generating the SFT model's responses, to compare with", counted=True)
                answers = self._timed("generate", lambda: self._generator.generate(setup.prompts, setup.generation))
                self._sft = setup.prompts, [response.judged for response in answers[0]]
            else:
                self._sft = setup.prompts, list(point.judged)
        return self._sft[1]

    def _timed(self, what: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        try:
            with span(what):
                return work()
        finally:
            self._clock[what] += time.perf_counter() - started
