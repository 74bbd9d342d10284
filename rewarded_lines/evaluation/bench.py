"""The bench: an engine and rewards that turn points into records, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np

from rewarded_lines.data.prompts import Prompt, prompt_text
from rewarded_lines.engines.base import Generator, Model, Response, prompt_seed
from rewarded_lines.errors import UserError
from rewarded_lines.evaluation.points import PointSpec
from rewarded_lines.evaluation.records import Point, draft_path, read_point, write_point
from rewarded_lines.evaluation.sweep_setup import Setup
from rewarded_lines.processes import give_back_memory
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.scoring.scorer import Scorer

# Where weights are swapped, the SFT model comes back after so many points or seconds. A kill costs what came since.
_POINTS_A_SPELL = 16
_SPELL_SECONDS = 20.0
Keys = Mapping[PointSpec, str]
Made = tuple[tuple[str, PointSpec], list[Response], np.ndarray | None]
Result = TypeVar("Result")


class Producer(Protocol):
    """Whatever makes records of points: a bench here, or workers elsewhere."""

    @property
    def width(self) -> int:
        """How many points it works on at the same time."""
        ...

    def produce(self, setup: Setup, keys: Keys, missing: Iterable[str]) -> Iterator[tuple[str, Point]]:
        """Yield (key, point) for every key in `missing`, in any order.

        Args:
            setup: the project, with the prompts to answer.
            keys: all points that belong together, in order.
            missing: the keys whose records are wanted.
        """
        ...

    def seconds(self) -> dict[str, float]:
        """Return where the time went, by what was done."""
        ...


class Bench:
    """Generates and scores in this process, with one engine for all points."""

    width = 1

    def __init__(self, setup: Setup, folder: Path, also: Sequence[Prompt] = (), progress: Progress = SILENT) -> None:
        """Remember what is needed; engine and reward models are loaded when the first point is.

        Args:
            setup: the project.
            folder: the run's; responses wait there for their scores, and scores are kept.
            also: further prompts that the engine must have room for.
            progress: is told of the steps.
        """
        self._setup = setup
        self._progress = progress
        self._folder = folder
        self._also = also
        self._clock = {"engine": 0.0, "generate": 0.0}

    def __enter__(self) -> Bench:
        """Return the bench itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Free engine and rewards, whatever happened."""
        if "_generator" in self.__dict__:
            self._generator.close()
        if "_scorer" in self.__dict__:
            self._scorer.close()

    def produce(self, setup: Setup, keys: Keys, missing: Iterable[str]) -> Iterator[tuple[str, Point]]:
        """See `Producer.produce`.

        Points are generated in the same company whatever is missing, so a run that was killed ends with the records of
        one that was not.
        """
        wanted = set(missing)
        specs = list({key: spec for spec, key in keys.items()}.items())
        together = self._generator.at_once
        turns = self._batches(setup, specs, wanted, together) if together > 1 else self._spells(setup, specs, wanted)
        for turn in turns:
            for key, point in self._scored(setup, turn):
                yield key, point
                draft_path(self._folder, key).unlink(missing_ok=True)
            give_back_memory()

    def seconds(self) -> dict[str, float]:
        """Return seconds of building the engine, generating, swapping and scoring."""
        built = "_generator" in self.__dict__
        scored = self._scorer.seconds if "_scorer" in self.__dict__ else 0.0
        swap = self._generator.swap_seconds if built else 0.0
        return {**self._clock, "generate": self._clock["generate"] - swap, "swap": swap, "score": scored}

    @cached_property
    def _scorer(self) -> Scorer:
        return self._setup.scorer(self._folder / "scores.sqlite", self._progress)

    @cached_property
    def _generator(self) -> Generator:
        self._progress.start("building the engine")
        return self._timed("engine", lambda: self._setup.generator(self._also))

    def _batches(
        self, setup: Setup, specs: Sequence[tuple[str, PointSpec]], wanted: set[str], size: int
    ) -> Iterator[dict[str, Point]]:
        """Yield responses where models share a batch: all of a batch are generated again if one of them is missing."""
        for start in range(0, len(specs), size):
            batch = specs[start : start + size]
            todo = [key for key, _ in batch if key in wanted]
            drafts = self._drafts(todo)
            if any(key not in drafts for key in todo):
                models = [spec.model(setup.checkpoints) for _, spec in batch]
                self._progress.start(f"generating {len(batch)} points together", counted=True)
                answers = self._answers(setup, models)
                controls = [
                    self._control(setup, model) if key in todo else None
                    for (key, _), model in zip(batch, models, strict=True)
                ]
                made = list(zip(batch, answers, controls, strict=True))
                # The KL of all of them, too: what a pair shares a batch with is in the last bits of its score.
                points = dict(self._points(setup, made, self._log_ratios(setup, made)))
                drafts = self._kept({key: points[key] for key in todo})
            if drafts:
                yield drafts

    def _spells(
        self, setup: Setup, specs: Sequence[tuple[str, PointSpec]], wanted: set[str]
    ) -> Iterator[dict[str, Point]]:
        """Yield responses where weights are swapped: alone under its weights, a point does not depend on others.

        The SFT model, which says how likely responses were, takes its turn after some points, not after each.
        """
        todo = [(key, spec) for key, spec in specs if key in wanted]
        while todo:
            began = time.perf_counter()
            waiting: list[Made] = []
            drafts: dict[str, Point] = {}
            while (
                todo and len(waiting) + len(drafts) < _POINTS_A_SPELL and time.perf_counter() - began < _SPELL_SECONDS
            ):
                key, spec = todo.pop(0)
                if found := self._drafts([key]):
                    drafts |= found
                    continue
                model = spec.model(setup.checkpoints)
                self._progress.start(f"generating {spec}", counted=True)
                (answer,) = self._answers(setup, [model])
                waiting.append(((key, spec), answer, self._control(setup, model)))
            kl = [ratios for one in waiting for ratios in self._log_ratios(setup, [one])]
            yield drafts | self._kept(dict(self._points(setup, waiting, kl)))

    def _drafts(self, keys: Iterable[str]) -> dict[str, Point]:
        """Return the responses that an earlier run left unscored."""
        found = {}
        for key in keys:
            path = draft_path(self._folder, key)
            if path.is_file():
                try:
                    found[key] = read_point(path)
                except UserError:
                    path.unlink()
        return found

    def _answers(self, setup: Setup, models: Sequence[Model]) -> list[list[Response]]:
        return self._timed("generate", partial(self._generator.generate, setup.prompts, setup.generation, models))

    def _kept(self, drafts: dict[str, Point]) -> dict[str, Point]:
        """Return what is known of points before they are scored, kept in case that this takes long."""
        for key, point in drafts.items():
            write_point(draft_path(self._folder, key), point)
        return drafts

    def _control(self, setup: Setup, model: Model) -> np.ndarray | None:
        """Return each control text's negative log-likelihood in nats and its number of predicted tokens, [texts, 2]."""
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
        """Return log π(y|x) − log π_SFT(y|x) of every response of some points, which the SFT model scores together."""
        heads = [head for head in self._generator.encode(setup.prompts) for _ in range(setup.generation.n)]
        pairs = [
            pair
            for (_, spec), responses, _ in made
            if spec.model(setup.checkpoints) is not None
            for pair in zip(heads, (response.tokens for response in responses), strict=True)
        ]
        if pairs:
            what = made[0][0][1] if len(made) == 1 else f"{len(made)} points"
            self._progress.start(f"KL of {what}", counted=True)
        found = iter(self._timed("generate", lambda: self._generator.logprobs(pairs)) if pairs else [])
        ratios = []
        for (_, spec), responses, _ in made:
            own = np.array([response.logprob for response in responses])
            base = spec.model(setup.checkpoints) is None
            ratios.append(own - (own if base else np.fromiter(islice(found, len(own)), float, len(own))))
        return ratios

    def _points(self, setup: Setup, made: Sequence[Made], kl: Sequence[np.ndarray]) -> Iterator[tuple[str, Point]]:
        """Yield points that wait for their scores."""
        count, samples = len(setup.prompts), setup.generation.n
        index = np.repeat(np.arange(count), samples)
        texts = [prompt_text(prompt) for prompt in setup.prompts]
        seeds = [prompt_seed(setup.generation, i, k) for i in range(count) for k in range(samples)]
        for ((key, spec), responses, control), ratios in zip(made, kl, strict=True):
            yield (
                key,
                Point(
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
                ),
            )

    def _scored(self, setup: Setup, drafts: Mapping[str, Point]) -> Iterator[tuple[str, Point]]:
        """Yield points with their scores, all responses scored in one go: fuller batches."""
        prompts = [setup.prompts[index] for draft in drafts.values() for index in draft.prompt_index]
        responses = [response for draft in drafts.values() for response in draft.judged]
        scores = {name: np.array(values) for name, values in self._scorer.score(prompts, responses).items()}
        start = 0
        for key, draft in drafts.items():
            own = slice(start, start + len(draft.responses))
            yield key, replace(draft, scores={name: scores[name][own].astype(np.float64) for name in setup.rewards})
            start = own.stop

    def _timed(self, what: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self._clock[what] += time.perf_counter() - started
