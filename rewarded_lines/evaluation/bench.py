"""The bench: an engine and rewards that turn points into records, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np

from rewarded_lines.data.prompts import Prompt, prompt_text
from rewarded_lines.engines.generation import Generator, Response, prompt_seed
from rewarded_lines.errors import UserError
from rewarded_lines.evaluation.forgetting import control_sums
from rewarded_lines.evaluation.points import PointSpec
from rewarded_lines.evaluation.records import Point, draft_path, read_point, write_point
from rewarded_lines.evaluation.setup import Setup
from rewarded_lines.scoring.scorer import Scorer

# Where weights are swapped, the SFT model comes back once for so many points, to say how likely their responses are.
_POINTS_A_TURN = 4
Keys = Mapping[PointSpec, str]
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

    def __init__(self, setup: Setup, folder: Path, also: Sequence[Prompt] = ()) -> None:
        """Remember what is needed; engine and reward models are loaded when the first point is.

        Args:
            setup: the project.
            folder: the run's; responses wait there for their scores, and scores are kept.
            also: further prompts that the engine must have room for.
        """
        self._setup = setup
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
        size = self._generator.at_once if self._generator.at_once > 1 else _POINTS_A_TURN
        for start in range(0, len(specs), size):
            turn = specs[start : start + size]
            todo = [key for key, _ in turn if key in wanted]
            if not todo:
                continue
            drafts = self._drafts(todo)
            if any(key not in drafts for key in todo):
                for key, draft in self._generate(setup, turn, set(todo)):
                    drafts[key] = draft
            for key in todo:
                yield key, self._scored(setup, drafts[key])
                draft_path(self._folder, key).unlink(missing_ok=True)

    def seconds(self) -> dict[str, float]:
        """Return seconds of building the engine, generating, swapping and scoring."""
        built = "_generator" in self.__dict__
        scored = self._scorer.seconds if "_scorer" in self.__dict__ else 0.0
        swap = self._generator.swap_seconds if built else 0.0
        return {**self._clock, "generate": self._clock["generate"] - swap, "swap": swap, "score": scored}

    @cached_property
    def _scorer(self) -> Scorer:
        return self._setup.scorer(self._folder / "scores.sqlite")

    @cached_property
    def _generator(self) -> Generator:
        return self._timed("engine", lambda: self._setup.generator(self._also))

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

    def _generate(
        self, setup: Setup, turn: Sequence[tuple[str, PointSpec]], todo: set[str]
    ) -> Iterator[tuple[str, Point]]:
        """Generate under each point's weights, then ask the SFT model how likely the responses are."""
        swapped = self._generator.at_once == 1
        # Alone under its weights, a point does not depend on its neighbours, so those that are there need not be again.
        members = [(key, spec) for key, spec in turn if key in todo or not swapped]
        models = [spec.model(setup.checkpoints) for _, spec in members]
        answers: list[list[Response]] = []
        controls: list[np.ndarray | None] = []
        for batch in [[model] for model in models] if swapped else [models]:
            generate = partial(self._generator.generate, setup.prompts, setup.generation, batch)
            answers += self._timed("generate", generate)
            controls += [self._control(setup, model) for model in batch]
        for (key, spec), responses, control in zip(members, answers, controls, strict=True):
            if key in todo:
                point = replace(self._point(setup, spec, responses), control=control)
                write_point(draft_path(self._folder, key), point)
                yield key, point

    def _control(self, setup: Setup, model: object) -> np.ndarray | None:
        if not setup.control:
            return None
        windows = setup.control_rows(self._generator)
        pairs = [(head, tail) for _, head, tail in windows]
        logprobs = self._timed("generate", lambda: self._generator.logprobs(pairs, model))  # type: ignore[arg-type]
        return control_sums(len(setup.control), windows, logprobs)

    def _point(self, setup: Setup, spec: PointSpec, responses: Sequence[Response]) -> Point:
        count, samples = len(setup.prompts), setup.generation.n
        index = np.repeat(np.arange(count), samples)
        heads = self._generator.encode(setup.prompts)
        texts = [prompt_text(prompt) for prompt in setup.prompts]
        own = [response.logprob for response in responses]
        pairs = [(heads[i], response.tokens) for i, response in zip(index, responses, strict=True)]
        model = spec.model(setup.checkpoints)
        under_sft = own if model is None else self._timed("generate", lambda: self._generator.logprobs(pairs))
        seeds = [prompt_seed(setup.generation, i, k) for i in range(count) for k in range(samples)]
        return Point(
            spec=spec,
            prompts=[texts[i] for i in index],
            responses=[response.text for response in responses],
            prompt_index=index.astype(np.int64),
            seeds=np.array(seeds, dtype=np.int64),
            tokens=np.array([len(response.tokens) for response in responses], dtype=np.int64),
            ended=np.array([response.ended for response in responses]),
            kl=np.array(own) - np.array(under_sft),
        )

    def _scored(self, setup: Setup, draft: Point) -> Point:
        scores = self._scorer.score(draft.prompts, draft.responses)
        return replace(draft, scores={name: np.array(scores[name], dtype=np.float64) for name in setup.rewards})

    def _timed(self, what: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self._clock[what] += time.perf_counter() - started
