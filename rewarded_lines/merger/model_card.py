"""The model card of a merged folder, its README.md: metadata that the Hub reads, and what people want to know.

Names come from users and from other people's files, so every one of them is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewarded_lines import __version__
from rewarded_lines.errors import printable
from rewarded_lines.merger.input_cards import InputCard, input_cards
from rewarded_lines.merger.methods import LINES_PAPER, METHODS, SOUPS_PAPER
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.record import RECORD_FILE
from rewarded_lines.merger.spec import MergeSpec

HERE = "this folder"
_OTHER_LICENCE = "other"
_WIDE = 6
# The classes that transformers loads a model with, by the end of its architecture's name.
_LOADERS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "T5ForConditionalGeneration": ("AutoModelForSeq2SeqLM", ""),
    "BartForConditionalGeneration": ("AutoModelForSeq2SeqLM", ""),
    "ForConditionalGeneration": ("AutoModelForImageTextToText", "image-text-to-text"),
}


@dataclass(frozen=True)
class CardAddition:
    """What a card shows beside what the merge itself knows.

    Attributes:
        sections: Markdown, put before the instructions.
        files: figures and the like, by the name that each gets in the merged folder.
        repository: the Hub id that the folder will have; readers load that.
    """

    sections: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    repository: str = ""


Additions = Callable[[Plan], Callable[[MergeSpec], CardAddition]]
"""Called with the checked inputs before anything is written; the function it returns is called for each output."""


def model_card(plan: Plan, spec: MergeSpec, settings: Mapping[str, Any], addition: CardAddition | None = None) -> str:
    """Return the README.md of a merged folder.

    Args:
        plan: the inputs.
        spec: the numbers.
        settings: what else decides the bytes, as for `merge.json`.
        addition: what else the card shows.
    """
    addition = addition or CardAddition()
    inputs = input_cards(plan)
    parts = [
        f"# {_kind(spec)} of {', '.join(map(escaped, plan.policies))}",
        _introduction(plan),
        _fenced("", _formula(plan, spec)),
        _inputs_table(plan, spec, inputs),
        _numbers_table(plan, spec),
        addition.sections,
        "## Load it",
        *_usage(plan, spec, inputs, addition.repository or HERE),
        "## Make it again",
        *_again(plan, spec, settings, inputs),
        "## Licences",
        _licences(inputs),
        "## Papers",
        "\n".join(f"- {name}, [arXiv {number}](https://arxiv.org/abs/{number})" for name, number in _papers(spec)),
    ]
    return _front(_metadata(plan, spec, inputs)) + printable("\n\n".join(part for part in parts if part) + "\n")


def escaped(text: str) -> str:
    """Return text on one line, escaped so that Markdown shows it unchanged, in a table too."""
    return re.sub(r"([\\`*_\[\]<>&|~!$#])", r"\\\1", " ".join(text.split()))


def literal(text: str) -> str:
    """Return text as code, in a table too; text with backticks is escaped instead."""
    line = " ".join(text.split())
    return escaped(line) if "`" in line or not line else "`" + line.replace("|", "\\|") + "`"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a table in Markdown; the first row has the headings, and cells are Markdown already.

    Args:
        rows: of equal length.
        right: the columns that are set to the right.
    """
    ruler = ["--:" if column in right else ":--" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ruler, *rows[1:]))


def _front(metadata: Mapping[str, Any]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=False)}---\n"


def _metadata(plan: Plan, spec: MergeSpec, inputs: Mapping[str, InputCard]) -> dict[str, Any]:
    """Return the metadata that the Hub reads, without what is not known."""
    adapter = plan.rank(spec) is not None
    languages, datasets = (_union(inputs, name) for name in ("languages", "datasets"))
    schedule = ["lines"] if spec.scaled else []
    method = ["rewarded-soups"] if spec.method == "soup" else [spec.method]
    found: dict[str, Any] = {
        **_licence(inputs),
        "language": languages,
        "datasets": datasets,
        "base_model": _union(inputs, "ids"),
        "base_model_relation": "merge",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": _loader(plan)[1],
        "tags": ["merge", *method, *schedule, "rlhf", *(["lora"] if adapter else []), "rewarded-lines"],
    }
    return {name: value for name, value in found.items() if value}


def _union(inputs: Mapping[str, InputCard], name: str) -> list[str]:
    return list(dict.fromkeys(value for card in inputs.values() for value in getattr(card, name)))


def _licence(inputs: Mapping[str, InputCard]) -> dict[str, str]:
    """Return the licence that all inputs share, `other` if they differ, nothing if one is not known."""
    known = {(card.licence, card.licence_name, card.licence_link) for card in inputs.values() if card.licence}
    if len(known) > 1:
        return {"license": _OTHER_LICENCE}
    if not known or not all(card.licence for card in inputs.values()):
        return {}
    licence, name, link = known.pop()
    if "," in licence:
        return {"license": _OTHER_LICENCE}
    told = {"license": licence, "license_name": name, "license_link": link}
    return {key: value for key, value in told.items() if value}


def _kind(spec: MergeSpec) -> str:
    if spec.method == "soup":
        return "LiNeS" if spec.scaled else "Rewarded Soup"
    return f"{spec.method} with LiNeS" if spec.scaled else spec.method


def _introduction(plan: Plan) -> str:
    count = len(plan.policies)
    made = f"merged by rewarded-lines {__version__}"
    if count == 1:
        return f"One policy aligned from a base model, its residual scaled; {made}."
    return f"{count} policies aligned from one base model, each with a reward of its own, {made}."


def _formula(plan: Plan, spec: MergeSpec) -> str:
    lines = ["θ = θ_base + s(ℓ) m,   τᵢ = θᵢ − θ_base", *METHODS[spec.method].written(spec.options)]
    outside = "α" if spec.outside == "alpha" else "that of the block beside them"
    lines.append(f"s(ℓ) = α + β (ℓ − 1)/(L − 1) for block ℓ of L; embeddings, final norm and head: {outside}")
    return "\n".join(lines)


def _papers(spec: MergeSpec) -> list[tuple[str, str]]:
    """Return title and arXiv number of the papers: LiNeS if it scales the residual, soups, the method's own."""
    return [*([LINES_PAPER] if spec.scaled else []), SOUPS_PAPER, *METHODS[spec.method].papers]


def _inputs_table(plan: Plan, spec: MergeSpec, inputs: Mapping[str, InputCard]) -> str:
    rows = [["", "model", "weight λ", "licence"]]
    rows.append(["base", _link(inputs[""]), "", _licence_text(inputs[""])])
    for name, weight in zip(plan.policies, spec.weights, strict=True):
        card = inputs[name]
        rows.append([f"policy {escaped(name)}", _link(card), f"{weight:.6g}", _licence_text(card)])
    return table(rows, right=(2,))


def _link(card: InputCard) -> str:
    """Return a model's name, linked if it is an id of the Hub."""
    on_hub = card.ids == (card.title,)
    return f"[{escaped(card.title)}](https://huggingface.co/{card.title})" if on_hub else literal(card.title)


def _licence_text(card: InputCard) -> str:
    if not card.licence:
        return "not given"
    text = escaped(f"{card.licence} ({card.licence_name})" if card.licence_name else card.licence)
    return f"[{text}]({card.licence_link})" if card.licence_link else text


def _numbers_table(plan: Plan, spec: MergeSpec) -> str:
    options = [f"{name} {value}" for name, value in spec.options.items()]
    rows = [["", ""], ["method", escaped(", ".join([spec.method, *options]))]]
    rows += [["α", f"{spec.alpha:.6g}"], ["β", f"{spec.beta:.6g}"]]
    for stack, scales in plan.scales(spec).items():
        rows.append([f"s of {literal(stack)}, {len(scales)} blocks", _span(scales)])
    if (rank := plan.rank(spec)) is not None:
        rows.append(["rank", str(rank)])
    return table(rows)


def _span(scales: Sequence[float]) -> str:
    """Return the scales of all blocks; of many blocks the first two and the last."""
    shown = [f"{scale:.4g}" for scale in scales]
    return ", ".join(shown) if len(shown) <= _WIDE else f"{shown[0]}, {shown[1]} … {shown[-1]}"


def _usage(plan: Plan, spec: MergeSpec, inputs: Mapping[str, InputCard], place: str) -> list[str]:
    """Return how to load the output with transformers or PEFT, and with vLLM."""
    loader, task = _loader(plan)
    model = json.dumps(place)
    generates = task == "text-generation"
    rank = plan.rank(spec)
    if rank is None:
        also = ", AutoTokenizer" if generates else ""
        lines = [f"from transformers import {loader}{also}", "", f"model = {loader}.from_pretrained({model})"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({model})"] if generates else []
        served = _fenced("python", f"from vllm import LLM\n\nllm = LLM({model})") if generates else ""
        return [_fenced("python", "\n".join(lines)), served and "In vLLM:", served]
    base = json.dumps(inputs[""].title, ensure_ascii=False)
    lines = ["from peft import PeftModel", f"from transformers import {loader}", ""]
    lines += [f"base = {loader}.from_pretrained({base})", f"model = PeftModel.from_pretrained(base, {model})"]
    text = f"A LoRA adapter of rank {rank}: the policies' adapters stacked, exactly their weighted sum."
    served = "\n".join(
        [
            "from vllm import LLM",
            "from vllm.lora.request import LoRARequest",
            "",
            f"# max_lora_rank: the least that vLLM takes and is at least {rank}.",
            f"llm = LLM({base}, enable_lora=True, max_lora_rank={_vllm_rank(rank)})",
            f'outputs = llm.generate(["..."], lora_request=LoRARequest("merged", 1, {model}))',
        ]
    )
    return [text, _fenced("python", "\n".join(lines)), "In vLLM:", _fenced("python", served)]


def _vllm_rank(rank: int) -> int:
    return next((one for one in (1, 8, 16, 32, 64, 128, 256, 320, 512) if one >= rank), rank)


def _loader(plan: Plan) -> tuple[str, str]:
    """Return the class of transformers that loads the model, and the Hub's word for what it does ("" if unsure)."""
    names = plan.base.config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return next((row for end, row in _LOADERS.items() if name.endswith(end)), ("AutoModel", ""))


def _again(plan: Plan, spec: MergeSpec, settings: Mapping[str, Any], inputs: Mapping[str, InputCard]) -> list[str]:
    """Return the command that makes the same merge, and the one that makes it from the record."""
    record = (
        f"`{RECORD_FILE}` has the BLAKE3 hash of every input file. `rewarded-lines merge --from {RECORD_FILE}` refuses "
        "inputs that are others, and makes the same bits; `--base` and `--policy NAME=…` say where they are now."
    )
    if spec.method == "greedy":
        return [record]
    local = [card.title for card in inputs.values() if card.ids != (card.title,)]
    names = ", ".join(map(literal, dict.fromkeys(local)))
    note = f"In it {names} {'stand for folders' if len(local) > 1 else 'stands for a folder'}." if local else ""
    return [_fenced("bash", command(plan, spec, settings, inputs)), note, record]


def command(plan: Plan, spec: MergeSpec, settings: Mapping[str, Any], inputs: Mapping[str, InputCard]) -> str:
    """Return the `rewarded-lines merge` command that makes this merge; inputs go by their titles."""
    policies = {name: inputs[name].title for name in plan.policies}
    how = {name: settings[name] for name in ("dtype", "max_shard_size", "layers", "as") if name in settings}
    return spec.command(inputs[""].title, policies, **how)


def _licences(inputs: Mapping[str, InputCard]) -> str:
    """Return what the inputs' cards say of their licences, in words."""
    told = {card.licence for card in inputs.values()}
    text = "The table above has the licence of every input, as its own card gives it. "
    if told == {""}:
        return "No card of an input gives a licence: ask its authors before you share this model."
    if "" in told:
        return text + "Where none is given, ask the authors before you share this model."
    if len(told) > 1:
        return text + "They differ, and all of them hold for what was merged."
    return text + "They agree."


def _fenced(language: str, text: str) -> str:
    """Return text as a block of code, its fence longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
