"""Every language and image-text class of transformers, tiny and merged: right, refused, or wrong.

What a merge must be is computed in memory from transformers' own modules: the depth of a weight is its place in a
module's list of blocks, the values are float64. Nothing of the library's tables or names is used.
`every_class_table.py` is the command.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_configs import tiny_model

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

WEIGHT, ALPHA, BETA = 0.3, 0.5, 1.0
_COUNT = re.compile(r"layers?(_per_stack)?$|depth$|blocks?$")
_KINDS_OF_LAYERS = re.compile(r"layer_types$|layers_block_type$")
# The user's word that a refusal asks for.
_WORDS = {"layers": re.compile(r"--layers '([^']+)'"), "tower": re.compile(r"--tower (\S+)")}
# Lists that run side by side, and the levels of convolutional nets, between which sizes change.
_NO_BLOCKS = re.compile(r"projectors$|merger_list$|convs$|down$|up$|embed_tokens$")
_SHOWN = 3
KINDS = ("whole", "adapter", "full")


@dataclass
class Verdict:
    """What came out for one class and one kind of policies.

    Attributes:
        name: the class.
        group: "text" or "image".
        policies: "whole", "adapter" (LoRA into LoRA) or "full" (LoRA folded).
        outcome: "right", "layers" (right with the option that the refusal names), "refused", "wrong", or "not built".
        why: what was refused, where it is wrong, or why it was not built.
    """

    name: str
    group: str
    policies: str
    outcome: str
    why: str = ""


def classes() -> dict[str, str]:
    """Return the names of all classes, with their groups."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    images = set(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    causal = {name for name in dir(transformers) if name.endswith("ForCausalLM") and not name.startswith("Auto")}
    texts = (causal | set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())) - images
    return {name: "image" if name in images else "text" for name in sorted(texts | images, key=str.lower)}


def move(model: Any, seed: int, size: float = 0.05) -> Any:
    """Move every weight a little, also those that begin as zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                step = size * (weight.float().abs().nan_to_num(posinf=0).mean() + 0.01)
                weight.add_((torch.randn(weight.shape, generator=generator) * step).to(weight.dtype))
    return model


def state(model: Any) -> dict[str, torch.Tensor]:
    """Return a model's tensors; of tied ones only the first, whose place in the model counts."""
    firsts: dict[Any, str] = {}
    tensors = model.state_dict()
    for name, value in tensors.items():
        firsts.setdefault((value.data_ptr(), value.shape) if value.numel() else name, name)
    return {name: tensors[name].detach().clone() for name in firsts.values()}


def scales(model: Any) -> Callable[[str], float]:
    """Return λ^(ℓ) of each tensor by the model's own modules: lists whose length the config declares are blocks."""
    lists = block_lists(model)

    def scale(name: str) -> float:
        for path, count in lists.items():
            if name.startswith(f"{path}."):
                block = int(name.removeprefix(f"{path}.").split(".")[0])
                return ALPHA + (BETA * block / (count - 1) if count > 1 else 0.0)
        return ALPHA

    return scale


def block_lists(model: Any) -> dict[str, int]:
    """Return the outermost lists of modules with modules inside, of a length that the config declares.

    A list of single layers counts beside such a list of the same length: XLM has one for each part of a block.
    """
    declared = set(counts(model.config.to_dict()))
    lists = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    found: dict[str, int] = {}
    single: dict[str, int] = {}
    for path, module in lists.items():
        blocks = [block for block in module if any(True for _ in block.parameters())]
        nested = any(path.startswith(f"{other}.") for other in lists)
        if not blocks or nested or len(module) not in declared or _NO_BLOCKS.search(path):
            continue
        composed = any(any(True for _ in block.children()) for block in blocks)
        (found if composed else single)[path] = len(module)
    places = {(path.rpartition(".")[0], length) for path, length in found.items()}
    return found | {path: n for path, n in single.items() if (path.rpartition(".")[0], n) in places}


def counts(config: Any) -> Iterator[int]:
    """Yield every number of layers or blocks of a config, at every depth."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            yield from counts(value)
        elif isinstance(value, int) and not isinstance(value, bool) and _COUNT.search(str(key)):
            yield value
        elif isinstance(value, list) and _KINDS_OF_LAYERS.search(str(key)):
            yield len(value)


def differing(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], slack: dict[str, float]) -> list[str]:
    """Return the names whose values are not the expected ones, to float32."""
    wrong = []
    for name, value in expected.items():
        if name not in got:
            wrong.append(f"{name} is missing")
        elif not value.is_floating_point():
            wrong += [] if torch.equal(got[name], value) else [name]
        elif not torch.allclose(got[name].double(), value, rtol=2.0**-22, atol=slack.get(name, 1e-30), equal_nan=True):
            wrong.append(name)
    return wrong


def expected_values(base: Any, residuals: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return base + s·(λ·τ₁ + (1 − λ)·τ₂) in float64; what is equal everywhere stays."""
    scale, result = scales(base), {}
    for name, value in state(base).items():
        if not value.is_floating_point():
            result[name] = value
            continue
        step = WEIGHT * residuals[0][name] + (1 - WEIGHT) * residuals[1][name]
        result[name] = torch.where(step == 0, value.double(), value.double() + scale(name) * step)
    return result


def residual(policy: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return τ in float64, 0 where both are equal, infinities too."""
    return {
        name: torch.where(policy[name] == value, 0.0, policy[name].double() - value.double())
        for name, value in base.items()
        if value.is_floating_point()
    }


def load(name: str, folder: Path, **settings: Any) -> Any:
    """Return a model as transformers loads it; refuse one of which tensors are missing."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **settings)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"transformers loads {folder.name} without {sorted(map(str, info['missing_keys']))[:_SHOWN]}")
    return model


def attempt(run: Callable[[dict[str, str]], Any], check: Callable[[], list[str]]) -> tuple[str, str]:
    """Return outcome and reason of a merge; the options that a refusal names are tried, one after the other."""
    from rewarded_lines.errors import UserError

    words, why, outcome = [{}], "", ("", "")
    for word in words:
        said = " ".join(f"--{key} {value}" for key, value in word.items())
        try:
            run(word)
            wrong = check()
        except UserError as error:
            first = error.problems[0]
            why = why or f"{first.what} | {first.where} | got {first.got} | {first.remedy}"
            outcome = outcome if word else ("refused", why)
            named = {key: pattern.search(first.remedy) for key, pattern in _WORDS.items()}
            words += [{key: match[1]} for key, match in named.items() if match and not word]
        except Exception as error:  # noqa: BLE001 -- inputs that load must not crash the merge, nor give what does not
            outcome = ("wrong", " ".join(f"{said} {type(error).__name__}: {error}".split())[:300])
        else:
            if not wrong:
                return ("layers", said) if word else ("right", "")
            # With the user's word alone the tool cannot know better.
            outcome = outcome if word else ("wrong", f"{len(wrong)} tensors, {', '.join(wrong[:_SHOWN])}")
    return outcome


def save_policies(name: str, folder: Path, kinds: Sequence[str]) -> None:
    """Save a base and, of whole models, two policies of a class."""
    model = move(tiny_model(name), seed=9, size=1.0)
    model.save_pretrained(folder / "base")
    origin = {key: value.clone() for key, value in model.state_dict().items()}
    for seed, policy in enumerate(("first", "second") if "whole" in kinds else (), start=1):
        model.load_state_dict(origin)
        move(model, seed).save_pretrained(folder / policy)


def try_whole(name: str, folder: Path) -> tuple[str, str]:
    """Merge two whole policies of a class."""
    from rewarded_lines import merge

    base = load(name, folder / "base")
    origin = state(base)
    policies = [state(load(name, folder / policy)) for policy in ("first", "second")]
    exact = expected_values(base, [residual(policy, origin) for policy in policies])

    def run(word: dict[str, str]) -> None:
        given = [folder / "first", folder / "second"]
        how: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "allow_nonfinite": True, "overwrite": True, **word}
        merge(folder / "base", given, WEIGHT, out=folder / "whole", **how)

    def check() -> list[str]:
        return differing(state(load(name, folder / "whole")), exact, {})

    return attempt(run, check)


def save_adapters(name: str, folder: Path) -> None:
    """Save two LoRA adapters by PEFT's `all-linear`, as a trainer would."""
    from peft import LoraConfig, get_peft_model

    for seed, policy in enumerate(("first-lora", "second-lora"), start=1):
        model = load(name, folder / "base")
        task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
        torch.manual_seed(seed)
        settings = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights=False, task_type=task)
        get_peft_model(model, settings).save_pretrained(folder / policy)


def folded(name: str, folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return a model's tensors in float64 with an adapter folded in by PEFT."""
    from peft import PeftModel

    base = load(name, folder / "base", dtype=torch.float64)
    with warnings.catch_warnings():
        # PEFT does not know some names that it has saved itself, and fills these factors at random.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False)
    return state(model.merge_and_unload())


def try_adapters(name: str, folder: Path) -> dict[str, tuple[str, str]]:
    """Merge two adapters into an adapter, and into a whole model."""
    from rewarded_lines import merge

    base = load(name, folder / "base", dtype=torch.float64)
    origin = state(base)
    steps = [residual(folded(name, folder, folder / policy), origin) for policy in ("first-lora", "second-lora")]
    exact = expected_values(base, steps)
    # The factors are rounded to float32, so the error is relative to the change, not to the value.
    slack = {key: 1e-6 * float(abs(step).max()) for key, step in steps[0].items() if step.numel()}
    if not any(slack.values()):
        raise ValueError("PEFT changes nothing")

    def run(kind: str, word: dict[str, str]) -> None:
        given = [folder / "first-lora", folder / "second-lora"]
        how: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "allow_nonfinite": True, "overwrite": True, **word}
        merge(folder / "base", given, WEIGHT, out=folder / kind, as_=kind, **how)

    checks: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "adapter": lambda: folded(name, folder, folder / "adapter"),
        "full": lambda: state(load(name, folder / "full", dtype=torch.float64)),
    }
    return {
        kind: attempt(lambda word, kind=kind: run(kind, word), lambda made=made: differing(made(), exact, slack))
        for kind, made in checks.items()
    }


def try_class(name: str, group: str, kinds: Sequence[str] = KINDS) -> list[Verdict]:
    """Return the verdicts on one class."""
    folder = Path(tempfile.mkdtemp(prefix="every-class-"))

    def guarded(work: Callable[[], dict[str, tuple[str, str]]], kinds: Sequence[str]) -> list[Verdict]:
        try:
            return [Verdict(name, group, kind, *found) for kind, found in work().items()]
        except Exception as error:  # noqa: BLE001 -- whatever transformers or PEFT cannot do is told
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return [Verdict(name, group, kind, "not built", why) for kind in kinds]

    def adapters() -> dict[str, tuple[str, str]]:
        save_adapters(name, folder)
        return try_adapters(name, folder)

    try:
        if failed := guarded(lambda: save_policies(name, folder, kinds) or {}, kinds):
            return failed
        found = guarded(lambda: {"whole": try_whole(name, folder)}, KINDS[:1]) if "whole" in kinds else []
        return found + (guarded(adapters, KINDS[1:]) if set(KINDS[1:]) & set(kinds) else [])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
