"""The plan of `rounds`: what each round trains, merges and measures, by which commands, and from what."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import file_hash, model_hash
from rewarded_lines.checkpoints.reader import resolve_folder
from rewarded_lines.config import ProjectConfig
from rewarded_lines.errors import fail
from rewarded_lines.folders import atomic_file
from rewarded_lines.merger.merge import merge
from rewarded_lines.merger.merge_options import MergeOptions
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pipelines.recipe_jobs import Part, Watch, digest
from rewarded_lines.pipelines.round_options import RoundOptions
from rewarded_lines.projects import PROJECT_FILE, Project, named_places, save_project, with_places
from rewarded_lines.references import local_path, relative

# `rewarded-lines`, also where it is not on the path.
COMMAND = (sys.executable, "-P", "-c", "from rewarded_lines.cli import main; main()")
_CARRIED = ("tokenizer", "config_from")
_SHOWN = ("dtype", "layers", "tower", "max_shard_size", *_CARRIED)


@dataclass(frozen=True)
class RoundPlan:
    """What the rounds in the folder `out` do.

    Attributes:
        base: the SFT model, from the working directory.
        commands: how each policy is trained, as the user gave it, by name.
        spec: the merge, with `how`; η is in its α and β.
    """

    project: Project
    base: str
    commands: Mapping[str, Sequence[str]]
    spec: MergeSpec
    out: Path
    each: RoundOptions
    how: MergeOptions

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the models are made from."""
        config, root = self.project.config.model_dump(mode="json", exclude_defaults=True), self.project.root
        files = {name: local_path(name, root) for _, kind, name in named_places(config) if kind == "code"}
        # A file may be named behind an option: --config=ppo.yaml.
        files |= {word: Path(word.rpartition("=")[2]) for words in self.commands.values() for word in words}
        return {
            "base": model_hash(resolve_folder(self.base)),
            **{name: config.get(name, {}) for name in ("rewards", "generation")},
            "train": {name: {str(at): word for at, word in enumerate(words)} for name, words in self.commands.items()},
            "files": {name: file_hash(path) for name, path in files.items() if path.is_file()},
            "merge": {
                **self.spec.as_dict(list(self.commands)),
                **({"alpha": "auto"} if self.how.alpha == "auto" else {}),
                **{name: getattr(self.how, name) for name in ("dtype", "layers", "tower", *_CARRIED)},
            },
            **{name: getattr(self.each, name) for name in ("eta", "ema", "training_seed")},
        }

    @property
    def numbers(self) -> range:
        """The rounds, from 1 on."""
        return range(1, self.each.rounds + 1)

    def folder(self, number: int) -> Path:
        """Return the folder of a round, which is a project of its own."""
        return self.out / f"round-{number}"

    def merged(self, number: int) -> str:
        """Return the model that a round ends with: of round 0 the SFT model."""
        return str(self.folder(number) / "merged") if number else self.base

    def policies(self, number: int) -> dict[str, str]:
        """Return the folders of a round's policies, by name."""
        return {name: str(self.folder(number) / "policies" / name) for name in self.commands}

    def training(self, number: int) -> list[Part]:
        """Return the training of a round's policies."""
        made_from, found = digest(self.settings), []
        for name, output in self.policies(number).items():
            command, check = self.training_words(number, name), partial(_check_model, output)
            command[0] = program(command[0])
            part = Part(f"round {number} {name}", Path(output), made_from, tuple(command), check, resumes=True)
            found.append(part)
        return found

    def training_words(self, number: int, name: str) -> list[str]:
        """Return the command that trains a policy: the user's, with what the round decides."""
        words, names = self.commands[name], list(self.commands)
        key = "reward" if name in self.project.config.rewards else "policy_name"
        seed = self.each.training_seed + (number - 1) * len(names) + names.index(name)
        moving = {"sync_ref_model": "true", "ref_model_mixup_alpha": self.each.ema, "ref_model_sync_steps": 1}
        own = {"project_file": self.folder(number) / PROJECT_FILE, "output_dir": self.policies(number)[name]}
        # The user's command may say these itself.
        given = {word.partition("=")[0] for word in words}
        own |= {key: value for key, value in {key: name, "seed": seed}.items() if f"--{key}" not in given}
        own |= moving if self.each.ema else {}
        return [*words, *(word for key, value in own.items() for word in (f"--{key}", str(value)))]

    def merging(self, number: int) -> Part:
        """Return the merge of a round's policies."""
        make = partial(self._merge, number)
        return Part(f"round {number} merge", Path(self.merged(number)), digest(self.settings), run=make)

    def _merge(self, number: int, watch: Watch) -> None:
        lam = None if METHODS[self.spec.method].weights == "none" else self.spec.weights
        merge(self.merged(number - 1), self.policies(number), lam, how=replace(self.how, out=self.merged(number)))

    def scoring(self, number: int) -> list[Part]:
        """Return the measuring of a round's model, if it is wanted."""
        if self.each.score is None:
            return []
        prompts = self.project.config.prompts
        made_from = [
            self.settings,
            file_hash(Path(self.each.score)),
            self.each.engine,
            prompts and prompts.model_dump(),
        ]
        command = (*COMMAND, "score", *self.scoring_words(number)[2:])
        return [Part(f"round {number} score", self.folder(number) / "score", digest(made_from), command)]

    def scoring_words(self, number: int) -> list[str]:
        """Return the command that measures a round's model."""
        options = {"config": self.out / "validation.yaml", "out": self.folder(number) / "score"}
        words = [f"--{key}={value}" for key, value in options.items()]
        return ["rewarded-lines", "score", self.merged(number), *words, f"--engine={self.each.engine}", "--quiet"]

    def parts(self, number: int) -> list[Part]:
        """Return all parts of a round."""
        return [*self.training(number), self.merging(number), *self.scoring(number)]

    def shown(self, number: int) -> list[str]:
        """Return a round's commands."""
        how = {name: value for name in _SHOWN if (value := getattr(self.how, name)) is not None}
        how |= {"alpha": "auto"} if self.how.alpha == "auto" else {}
        places = self.merged(number - 1), self.policies(number), self.merged(number)
        words = [self.training_words(number, name) for name in self.commands]
        scored = [self.scoring_words(number)] if self.each.score else []
        merged = self.spec.command(*places, as_="full", **how)
        return [*map(shlex.join, words), merged, *map(shlex.join, scored)]

    def write_project(self, number: int) -> None:
        """Make a round's folder a project, if it is none yet: from its start, with its policies."""
        path = self.folder(number) / PROJECT_FILE
        if not path.exists():
            policies = {name: f"policies/{name}" for name in self.commands}
            self._write(path, base=relative(self.merged(number - 1), path.parent), policies=policies)

    def write_validation(self) -> None:
        """Write the project that measures the rounds' models: beside SFT, on the validation prompts."""
        if self.each.score is not None:
            base, file = (relative(str(one), self.out) for one in (self.base, self.each.score))
            self._write(self.out / "validation.yaml", file, base=base, policies={})

    def _write(self, path: Path, prompts: str = "", **own: Any) -> None:
        """Write the project for another folder, without what names its policies; `prompts` are in another file."""
        project, folder = self.project, path.parent

        def moved(kind: str, name: str) -> str:
            if kind == "model":
                return name if "://" in name else relative(project.resolve(name), folder)
            # A pattern is no file that exists.
            return os.path.relpath(os.path.realpath(local_path(name, project.root)), os.path.realpath(folder))

        content = with_places(project.config.model_dump(mode="json", exclude_defaults=True), moved)
        # Mixtures must name all policies, and no others.
        left = _CARRIED if content.get("mixtures", {}).keys() == own["policies"].keys() else (*_CARRIED, "mixtures")
        content = {key: value for key, value in content.items() if key not in left}
        if prompts:
            source = {"file": prompts, "dataset": None, "subset": None, "revision": None}
            content["prompts"] = {**content.get("prompts", {}), **source}
        with atomic_file(path) as partial:
            save_project(partial, ProjectConfig.model_validate({**content, **own}))


def program(name: str) -> str:
    """Return the path of a program: that of this Python's environment, if it is there."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])) or name


def _check_model(folder: str, watch: Watch) -> None:
    """Refuse a training command that made no model."""
    if not any(Path(folder, name).is_file() for name in ("config.json", "adapter_config.json")):
        expected = "a model or an adapter, which the command writes to its --output_dir"
        raise fail("the training ended without a model", where=folder, expected=expected)
