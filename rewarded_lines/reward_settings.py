"""The settings of one reward in a project: where it comes from, and how its scores are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rewarded_lines.config_values import (
    CHAT,
    TEXT,
    Strict,
    check_template,
    check_url,
    check_variables,
    checked,
    parse_format,
)
from rewarded_lines.judge_settings import Pattern, Texts, Values, check_judge

# Where a reward comes from, as messages say it.
_SOURCES = {
    "model": "a classifier",
    "function": "module:name, file.py:name, or a ready one such as regex",
    "judge": "a language model that judges",
    "url": "a server that scores",
}
# Settings of judges.
_JUDGE = (
    "system", "plain", "chat_template_kwargs", "prefill", "token", "tokens", "pattern", "match", "verdicts",
    "unmatched", "against", "temperature", "max_new_tokens", "seed",
)  # fmt: skip
# Settings of servers that decide no score.
_REMOTE = ("key_env", "key_header", "concurrency", "timeout", "retries", "missing")
# Keys that only some sources have. An API is a judge with a URL.
_API = "judge: and url"
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("backend", "batch_tokens"), ("model", "judge")),
    "tokenizer": ("model", "function"),
    "trust_remote_code": ("model",),
    **dict.fromkeys(("workers", "options"), ("function",)),
    "messages": ("function", "url"),
    "columns": ("url",),
    **dict.fromkeys((*_REMOTE, "version"), ("url", _API)),
    "request": (_API,),
    **dict.fromkeys(_JUDGE, ("judge",)),
}
# Settings of a judge in this process.
_LOCAL = ("backend", "batch_tokens", "device", "dtype", "max_tokens", "plain", "prefill")
_DECIDES_NO_SCORE = {"batch_size", "batch_tokens", "description", "device", "role", "unit", "workers", *_REMOTE}
# Settings that records always had; they have the others where those are set.
_FIRST = (
    "model", "format", "template", "function", "messages", "role", "unit", "description", "batch_size", "max_tokens",
    "dtype", "device", "backend", "workers",
)  # fmt: skip
_FIRST_MAX_TOKENS = 512
# The format of a model with one class.
_ONE_CLASS = "0"


def _as_text(value: Any) -> Any:
    """Return the number of a class as text: YAML reads `format: 0` as a number."""
    return str(value) if type(value) is int else value


class RewardSpec(Strict):
    """One reward, for recipes and evaluator: a classifier, a language model that judges, a function, or a server.

    A `model` is a classifier: whole, a LoRA adapter of one, or a language model with a value head (TRL, OpenRLHF,
    LLaMA-Factory). Rewards that name one model and differ in `format` alone load it once, and it reads a text once.
    `format` is the score as a signed sum of classes, and must be given if there are several: "0" is the logit of class
    0, "1-0" a difference of logits, "0x0.4" a weighted one. Classes of the config's `id2label` also go by name, with
    spaces around the signs: "helpfulness - 0.2 x verbosity". The code in a model's folder runs only with
    `trust_remote_code`; the classes are then the output's `rewards`, and "score" for what the code makes of them.
    `tokenizer` is another folder's or Hub id's.
    `template` is the text that the model reads; a list of two is the pair for a cross-encoder; "chat" is the
    conversation in the reward model's own chat template. Without one, a model that has a chat template reads chats by
    it, as TRL's trainers do, and all else is "{prompt}{response}".

    A `function` is `(prompts, responses, **columns)`, one for TRL, or a ready one: `math_answer`, `json_schema`,
    `regex`, `length`, `language`, `readability`, `repetition`. With `messages`, it receives the turns of a chat, not
    their text; unset, one that TRL can call (`completions`, `**kwargs`) gets them. `options` are parameters of a
    function, and a `tokenizer` makes its `completion_ids`. `workers` are processes for it.

    A `judge` is a causal model. Its user's turn is the `template`, with {prompt}, {response} and columns of the row
    such as {rubric}; a `system` turn may precede it, and its answer begins with `prefill`. The template "chat" is the
    conversation itself, which guards expect. With `plain`, or without a chat template, the judge continues the text.
    The score is one of three: the probability Σ P of the texts in `token` as the next token; Σ v·P / Σ P over the texts
    of `tokens` with their values v (in a list, 1 for the first and 0 for the others); or what `pattern` finds in an
    answer of up to `max_new_tokens`, the `match` "last" or "first": a number, or its value in `verdicts`. Where the
    judge gives no verdict, `unmatched` is an "error" that names the row, or the judge may "abstain". `against` a column
    of answers, or "sft" for the SFT model's responses, both orders are asked: the score is the mean of both shares of
    a win, where a verdict's value is the share of the answer shown first and "tie" is 0.5.

    A server at `url` gets {"prompts", "responses", "columns"} of `batch_size` pairs (16 by default) by POST, with the
    `columns` named here, and answers {"scores": [a number or null for each]}. With a `judge`, the URL is that of an API
    for chat completions, such as https://api.openai.com/v1; `request` has more keys for it, and null removes one, as in
    {max_tokens: null, max_completion_tokens: 64}. `concurrency` requests are under way at once; each may take `timeout`
    seconds and is repeated up to `retries` times. `key_env` names the environment variable with the key, sent in
    `key_header`. Cached scores belong to the URL and this `version`: change it when the server scores differently. With
    `missing: leave_out`, a sweep goes on where the server fails on a response.

    A reward of the role "audit" is reported only: no training, choice or hypervolume uses it. `max_tokens` limits the
    text, by default to what the model can read. `backend` and `device` run a model, in `dtype`; "auto" is the one that
    its config names. A batch has up to `batch_tokens` tokens, padding included: by default 16 × `batch_size`, so 1,024
    on a CPU, and 8,192 on a GPU.
    """

    model: str | None = None
    format: Annotated[Annotated[str, checked(parse_format)] | None, BeforeValidator(_as_text)] = None
    template: Annotated[str | tuple[str, str], checked(check_template)] = TEXT
    function: str | None = None
    messages: bool | None = None
    options: Annotated[dict[str, Any], checked(check_variables)] = {}
    tokenizer: str | None = None
    role: Literal["objective", "audit"] = "objective"
    unit: str = ""
    description: str = ""
    batch_size: int = Field(64, ge=1)
    batch_tokens: int | None = Field(None, ge=16)
    max_tokens: int | None = Field(None, ge=1)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    device: str | None = None
    backend: Literal["hf", "vllm"] = "hf"
    trust_remote_code: bool = False
    workers: int = Field(0, ge=0)
    judge: str | None = None
    system: str | None = None
    plain: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], checked(check_variables)] = {}
    prefill: str = ""
    token: Texts = ()
    tokens: Values = {}
    pattern: Pattern | None = None
    match: Literal["last", "first"] = "last"
    verdicts: Values = {}
    unmatched: Literal["error", "abstain"] = "error"
    against: str | None = Field(None, min_length=1)
    temperature: float = Field(0.0, ge=0)
    max_new_tokens: int = Field(512, ge=1)
    seed: int = Field(0, ge=0, lt=1_000_000)
    url: Annotated[str, checked(check_url)] | None = None
    columns: tuple[str, ...] = ()
    version: str = ""
    request: dict[str, Any] = {}
    key_env: str | None = None
    key_header: str = "Authorization"
    concurrency: int = Field(64, ge=1, le=1024)
    timeout: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0)
    missing: Literal["refuse", "leave_out"] = "refuse"

    @model_validator(mode="after")
    def _one_source(self) -> RewardSpec:
        given = [source for source in _SOURCES if getattr(self, source) is not None]
        if len(given) != 1 and given != ["judge", "url"]:
            raise ValueError("declare one of " + ", ".join(f"`{key}:` ({what})" for key, what in _SOURCES.items()))
        kinds = {given[0], _API if len(given) == 2 else given[0]}
        for key, sources in _ONLY_FOR.items():
            if not kinds & {*sources} and self._is_set(key):
                raise ValueError(f"`{key}:` is for rewards with {' or '.join(f'`{one}:`' for one in sources)}")
        if self.messages and self.function is not None and ":" not in self.function:
            raise ValueError("`messages:` is for your own functions; ready ones read the text of a response")
        if self.judge is not None:
            check_judge(self)
            if self.url and (local := [key for key in _LOCAL if self._is_set(key)]):
                raise ValueError(f"`{local[0]}:` is for a judge in this process, without `url:`")
        if self.batch_tokens is not None and "batch_size" in self.model_fields_set:
            raise ValueError("give either `batch_tokens:` or `batch_size:`")
        if self.judge is None and "{response}" not in self.template and self.template != CHAT:
            raise ValueError("{a} and {b} in a template are for a judge; this one needs {response}")
        return self

    def _is_set(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def source(self) -> str:
        """Where the reward comes from: the key that names it, such as "model" or "function"."""
        return next(source for source in _SOURCES if getattr(self, source) is not None)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for records."""
        first = self.model_dump(mode="json", include=set(_FIRST)) | {"format": self.format or _ONE_CLASS}
        return first | self.model_dump(mode="json", exclude_defaults=True) | {"messages": bool(self.messages)}

    def decides(self) -> dict[str, Any]:
        """Return the settings that decide scores."""
        content = {key: value for key, value in self.as_dict().items() if key not in _DECIDES_NO_SCORE}
        if not self.messages:
            del content["messages"]
        # Longer texts are refused or read whole, so the limit decides no score.
        content["max_tokens"] = self.max_tokens or _FIRST_MAX_TOKENS
        return content
