"""What tells a server what to serve: variables of the environment. Nothing heavy is imported here."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PROJECT = "REWARDED_LINES_PROJECT"
"""The project file whose policies and curves are served."""
SETTINGS = {name: f"REWARDED_LINES_{name.upper()}" for name in ("step", "layers", "tower")}
"""Other settings of the menu: the step of λ, and what `sweep` calls --layers and --tower."""
VARIABLE = "REWARDED_LINES_SERVED"
"""All that the command tells the server; see `ServedSettings`."""
# Bytes of a request: a chat with pictures has some megabytes.
MOST_BYTES = 32 << 20


@dataclass(frozen=True)
class ServedSettings:
    """The facts of a server, in plain types.

    Attributes:
        project: the project file.
        points: `PointSpec.as_dict` of each point that has a name, `default` among them.
        step: of λ; see `Menu`.
        how: layers and tower, as `sweep` takes them.
        whole: of a server of whole models, `plan_message` and level of `MergingWorker.open_plan`; else empty.
        rewards: name and unit of each reward of the run.
        measured: the points of the run, as GET /preferences tells them.
        chat: whether the model has a chat template.
        sampling: temperature and max_tokens of the project, with which the page begins.
        admin: the hash of the key for POST /preference, "" if nobody may.
        most_bytes: the longest body of a request.
        ready: what to print once the server answers.
    """

    project: str = ""
    points: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    step: float = 0.01
    how: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    rewards: Sequence[Mapping[str, str]] = ()
    measured: Sequence[Mapping[str, Any]] = ()
    chat: bool = True
    sampling: Mapping[str, float] = field(default_factory=dict)
    admin: str = ""
    most_bytes: int = MOST_BYTES
    ready: str = ""

    def variable(self) -> dict[str, str]:
        """Return the variable that holds the settings; compressed, since Linux limits its length."""
        text = json.dumps(asdict(self), ensure_ascii=False)
        return {VARIABLE: base64.b64encode(zlib.compress(text.encode())).decode()}


def settings_given() -> ServedSettings | None:
    """Return the settings in the environment, None where vLLM was started by other means."""
    text = os.environ.get(VARIABLE)
    return ServedSettings(**json.loads(zlib.decompress(base64.b64decode(text)))) if text else None
