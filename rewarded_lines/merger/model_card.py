"""The model card of a merged folder, its README.md: metadata for the Hub, then text for people.

Names come from users and from other people's files, so each one is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewarded_lines import __version__
from rewarded_lines.errors import printable
from rewarded_lines.merger.adapter_settings import served_rank
from rewarded_lines.merger.input_cards import InputCard, input_cards
from rewarded_lines.merger.methods import LINES_PAPER, METHODS, SOUPS_PAPER
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.preferences import preference_text
from rewarded_lines.merger.record import RECORD_FILE, title
from rewarded_lines.merger.spec import MergeSpec

HERE = "this folder"
_WIDE = 6
# By the end of an architecture's name: transformers' class that loads it, and the Hub's task.
_LOADERS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForConditionalGeneration": ("AutoModelForImageTextToText", "image-text-to-text"),
}


@dataclass(frozen=True)
class CardAddition:
    """More content for a card.

    Attributes:
        sections: Markdown, inserted before the instructions.
        files: figures and other files, by their name in the merged folder.
        repository: the Hub id to load the model from.
    """

    sections: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    repository: str = ""


Additions = Callable[[Plan], Callable[[MergeSpec], CardAddition]]
"""Takes the checked inputs before anything is written; returns a function that is called for each output."""


def model_card(plan: Plan, spec: MergeSpec, settings: Mapping[str, Any], addition: CardAddition | None = None) -> str:
    """Return the README.md of a merged folder; `settings` are those of `merge.json`."""
    import yaml

    addition = addition or CardAddition()
    inputs = input_cards(plan)
    parts = [
        f"# {_kind(spec)} of {', '.join(map(escaped, plan.policies))}",
        _introduction(plan),
        _fenced("", _formula(plan, spec)),
        _inputs_table(plan, spec, inputs),
        _numbers_table(plan, spec, settings.get("preference", {})),
        addition.sections,
        "## Load it",
        *_usage(plan, spec, inputs, addition.repository or HERE),
        "## Make it again",
        *_again(plan, spec, settings, inputs),
        "## Licences",
        _licences(inputs),
        "## Papers",
        _papers(spec),
    ]
    front = yaml.safe_dump(_metadata(plan, spec, inputs), sort_keys=False, allow_unicode=False)
    return f"---\n{front}---\n" + printable("\n\n".join(part for part in parts if part) + "\n")


def escaped(text: str) -> str:
    """Return text on one line, escaped so that Markdown shows it unchanged, also in a table."""
    return re.sub(r"([\\`*_\[\]<>&|~!$#])", r"\\\1", " ".join(text.split()))


def literal(text: str) -> str:
    """Return text as code, also in a table; text with backticks is escaped instead."""
    line = " ".join(text.split())
    return escaped(line) if "`" in line or not line else "`" + line.replace("|", "\\|") + "`"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a table in Markdown from cells in Markdown; the first row are the headings.

    The columns in `right` are aligned right.
    """
    ruler = ["--:" if column in right else ":--" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ruler, *rows[1:]))


def _metadata(plan: Plan, spec: MergeSpec, inputs: Mapping[str, InputCard]) -> dict[str, Any]:
    """Return the known metadata that the Hub reads."""
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
    """Return the licence that all inputs share, "other" if they differ, {} if one is unknown."""
    known = {(card.licence, card.licence_name, card.licence_link) for card in inputs.values()}
    named = {row for row in known if row[0]}
    if len(named) > 1:
        return {"license": "other"}
    if named != known:
        return {}
    licence, name, link = known.pop()
    if "," in licence:
        return {"license": "other"}
    given = {"license": licence, "license_name": name, "license_link": link}
    return {key: value for key, value in given.items() if value}


def _kind(spec: MergeSpec) -> str:
    if spec.schedule.forms:
        return f"{'Rewarded Soup' if spec.method == 'soup' else spec.method}, scaled by {spec.schedule.forms}"
    if spec.method == "soup":
        return "LiNeS" if spec.scaled else "Rewarded Soup"
    return f"{spec.method} with LiNeS" if spec.scaled else spec.method


def _introduction(plan: Plan) -> str:
    text = f"{len(plan.policies)} policies aligned from one base model, each with its own reward"
    if len(plan.policies) == 1:
        text = "One policy aligned from a base model, with a scaled residual"
    return f"{text}; merged by rewarded-lines {__version__}."


def _formula(plan: Plan, spec: MergeSpec) -> str:
    schedule, outside = spec.schedule, "that of the block beside them"
    several, listed = len(schedule.lines) > 1, any(line.blocks for line in schedule.lines)
    lines = ["θ = θ_base + s(ℓ) m,   τᵢ = θᵢ − θ_base", *METHODS[spec.method].written(spec.options)]
    if several:
        lines[0] = "θ = θ_base + m,   τᵢ = θᵢ − θ_base,   where λᵢ sᵢ(ℓ) stands for λᵢ"
    if spec.outside == "alpha":
        outside = "that of the first block" if several or listed else "α"
    depth = f"{'sᵢ(ℓ) = αᵢ + βᵢ' if several else 's(ℓ) = α + β'} (ℓ − 1)/(L − 1) for block ℓ of L"
    depth = "s: the coefficients below" if listed else depth
    lines.append(f"{depth}; embeddings, final norm and head: {outside}")
    if factors := ", ".join(f"{factor:.6g} in {kind}" for kind, factor in schedule.modules):
        lines.append(f"s times {factors}")
    return "\n".join(lines)


def _papers(spec: MergeSpec) -> str:
    papers = [*([LINES_PAPER] if spec.scaled else []), SOUPS_PAPER, *METHODS[spec.method].papers]
    return "\n".join(f"- {title}, [arXiv {number}](https://arxiv.org/abs/{number})" for title, number in papers)


def _inputs_table(plan: Plan, spec: MergeSpec, inputs: Mapping[str, InputCard]) -> str:
    rows = [["", "model", "weight λ", "licence"]]
    rows.append(["base", _link(inputs[""]), "", _licence_text(inputs[""])])
    for name, weight in zip(plan.policies, spec.weights, strict=True):
        card = inputs[name]
        rows.append([f"policy {escaped(name)}", _link(card), f"{weight:.6g}", _licence_text(card)])
    return table(rows, right=(2,))


def _link(card: InputCard) -> str:
    """Return a model's name, with a link if it is a Hub id."""
    on_hub = card.ids == (card.title,)
    return f"[{escaped(card.title)}](https://huggingface.co/{card.title})" if on_hub else literal(card.title)


def _licence_text(card: InputCard) -> str:
    if not card.licence:
        return "not given"
    text = escaped(f"{card.licence} ({card.licence_name})" if card.licence_name else card.licence)
    return f"[{text}]({card.licence_link})" if card.licence_link else text


def _numbers_table(plan: Plan, spec: MergeSpec, preference: Mapping[str, float]) -> str:
    options = [f"{name} {value}" for name, value in spec.options.items()]
    rows = [["", ""], ["method", escaped(", ".join([spec.method, *options]))]]
    if spec.schedule.forms:
        rows.append(["schedule", escaped(spec.schedule.text(list(plan.policies)))])
    else:
        rows += [["α", f"{spec.alpha:.6g}"], ["β", f"{spec.beta:.6g}"]]
    rows += [["preference μ, λ = B⁻¹μ", escaped(preference_text(preference))]] if preference else []
    for stack, scales in plan.scales(spec).items():
        shown = [f"{scale:.4g}" for scale in scales]
        if len(shown) > _WIDE:
            shown = [f"{shown[0]}, {shown[1]} … {shown[-1]}"]
        rows.append([f"s of {literal(stack)}, {len(scales)} blocks", ", ".join(shown)])
    if (rank := plan.rank(spec)) is not None:
        rows.append(["rank", str(rank)])
    return table(rows)


def _usage(plan: Plan, spec: MergeSpec, inputs: Mapping[str, InputCard], place: str) -> list[str]:
    """Return the code that loads the output with transformers or PEFT, and with vLLM."""
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
    exact = "the policies' adapters stacked, exactly their weighted sum"
    text = f"A LoRA adapter of rank {rank}, {escaped(kept.sentence()) if (kept := plan.kept(spec)) else exact}."
    most = served_rank(rank)
    served = f"""\
from vllm import LLM
from vllm.lora.request import LoRARequest

# max_lora_rank: the least that vLLM takes and is at least {rank}.
llm = LLM({base}, enable_lora=True, max_lora_rank={most})
outputs = llm.generate(["..."], lora_request=LoRARequest("merged", 1, {model}))"""
    return [text, _fenced("python", "\n".join(lines)), "In vLLM:", _fenced("python", served)]


def _loader(plan: Plan) -> tuple[str, str]:
    """Return transformers' class that loads the model, and the Hub's task ("" if unsure)."""
    names = plan.base.config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = next((row for end, row in _LOADERS.items() if name.endswith(end)), None)
    # Classes of this name without eyes read text or audio.
    if found and not (name.endswith("ForConditionalGeneration") and "vision_config" not in plan.base.config):
        return found
    own = name.isidentifier() and "auto_map" not in plan.base.config
    return name if own else "AutoModel", ""


def _again(plan: Plan, spec: MergeSpec, settings: Mapping[str, Any], inputs: Mapping[str, InputCard]) -> list[str]:
    """Return the command that makes the same merge, and the one that repeats the record."""
    record = (
        f"`{RECORD_FILE}` has the BLAKE3 hash of every input file. `rewarded-lines merge --from {RECORD_FILE}` refuses "
        "changed inputs and makes the same bits; `--base` and `--policy NAME=…` name inputs that have moved."
    )
    if spec.method == "greedy":
        return [record]
    carried = dict(plan.carried.asked)
    local = [card.title for card in inputs.values() if card.ids != (card.title,)]
    if (beside := plan.carried.beside) and title(beside, plan.carried.folders[beside]) != beside:
        carried["tokenizer"] = title(beside, plan.carried.folders[beside])
        local.append(carried["tokenizer"])
    names = ", ".join(map(literal, dict.fromkeys(local)))
    note = f"In it {names} {'stand for folders' if len(local) > 1 else 'stands for a folder'}." if local else ""
    policies = {name: inputs[name].title for name in plan.policies}
    how = {
        name: settings[name]
        for name in ("dtype", "max_shard_size", "layers", "tower", "as", "rank")
        if name in settings
    }
    return [_fenced("bash", spec.command(inputs[""].title, policies, **how, **carried)), note, record]


def _licences(inputs: Mapping[str, InputCard]) -> str:
    given = {card.licence for card in inputs.values()}
    text = "The table above has the licence of every input, as its own card gives it. "
    if given == {""}:
        return "No card of an input gives a licence: ask its authors before you share this model."
    if "" in given:
        return text + "Where none is given, ask the authors before you share this model."
    return text + ("They differ, and all of them apply to this model." if len(given) > 1 else "They agree.")


def _fenced(language: str, text: str) -> str:
    """Return text as a block of code, its fence longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
