"""The settings of one reward in a project: where it comes from, and how its scores are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rewarded_lines.config_values import Strict, check_template, check_url, checked, parse_format

# Where a reward comes from, as messages say it.
_SOURCES = {"model": "a classifier", "function": "module:name or file.py:name", "url": "a server that scores"}
# Keys that only some sources have.
_REMOTE = ("key_env", "key_header", "concurrency", "timeout", "retries", "missing")
_ONLY_FOR = {
    "backend": ("model",), "workers": ("function",), "messages": ("function", "url"), "columns": ("url",),
    "version": ("url",), **dict.fromkeys(_REMOTE, ("url",)),
}  # fmt: skip
_DECIDES_NO_SCORE = {"batch_size", "description", "device", "role", "unit", "workers", *_REMOTE}
# Later settings, with the values that earlier records had.
_LATER: dict[str, Any] = {"messages": False, "url": None, "columns": [], "version": ""}
_FIRST_MAX_TOKENS = 512


class RewardSpec(Strict):
    """One reward, for recipes and evaluator: a model with a format, a Python function, or a server.

    `format` is the score as a signed sum of CLASS or CLASSxWEIGHT terms: "0" is the logit of class 0, "1-0" a
    difference of logits, "0x0.4" a weighted one. `template` is the text that the model reads; a list of two is the pair
    for a cross-encoder; "chat" is the conversation in the reward model's own chat template. With `messages`, a function
    receives the turns of a chat, not their text. A reward of the role "audit" is reported only: no training, choice
    or hypervolume uses it. `max_tokens` limits the text, by default to what the model can read. `backend` and `device`
    run a model; `workers` are processes for a function.

    A server at `url` gets {"prompts", "responses", "columns"} of `batch_size` pairs (16 by default) by POST, with the
    `columns` named here, and answers {"scores": [a number or null for each]}. `concurrency` requests are under way at
    once; each may take `timeout` seconds and is repeated up to `retries` times. `key_env` names the environment
    variable with the key, sent in `key_header`. Cached scores belong to the URL and this `version`: change it when
    the server scores differently. With `missing: leave_out`, a sweep goes on where the server fails on a response.
    """

    model: str | None = None
    format: Annotated[str, checked(parse_format)] = "0"
    template: Annotated[str | tuple[str, str], checked(check_template)] = "{prompt}{response}"
    function: str | None = None
    messages: bool = False
    role: Literal["objective", "audit"] = "objective"
    unit: str = ""
    description: str = ""
    batch_size: int = Field(64, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    backend: Literal["hf", "vllm"] = "hf"
    workers: int = Field(0, ge=0)
    url: Annotated[str, checked(check_url)] | None = None
    columns: tuple[str, ...] = ()
    version: str = ""
    key_env: str | None = None
    key_header: str = "Authorization"
    concurrency: int = Field(64, ge=1, le=1024)
    timeout: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0)
    missing: Literal["refuse", "leave_out"] = "refuse"

    @model_validator(mode="after")
    def _one_source(self) -> RewardSpec:
        given = [source for source in _SOURCES if getattr(self, source) is not None]
        if len(given) != 1:
            raise ValueError("declare one of " + ", ".join(f"`{key}:` ({what})" for key, what in _SOURCES.items()))
        for key, sources in _ONLY_FOR.items():
            if given[0] not in sources and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}:` is for rewards with {' or '.join(f'`{one}:`' for one in sources)}")
        return self

    @property
    def source(self) -> str:
        """Where the reward comes from: the key that names it, such as "model" or "function"."""
        return next(source for source in _SOURCES if getattr(self, source) is not None)

    def decides(self) -> dict[str, Any]:
        """Return the settings that decide scores; later settings only where they are used."""
        content = self.model_dump(mode="json", exclude=_DECIDES_NO_SCORE)
        # Longer texts are refused or read whole, so the limit decides no score.
        content["max_tokens"] = self.max_tokens or _FIRST_MAX_TOKENS
        return {key: value for key, value in content.items() if key not in _LATER or value != _LATER[key]}
