"""Pre-flight for config.json: settings that change the meaning of weights, however a version spells them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewarded_lines.checkpoints.block_counts import of_text
from rewarded_lines.errors import Problem

REMEDY = "merge policies that were all trained from this base"
_STRUCTURE = ("num_hidden_layers", "vocab_size")
# Settings that change the meaning of weights without changing their shapes.
_MEANING = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "hidden_act", "hidden_activation"),
    *("activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rotary_pct"),
    *("partial_rotary_factor", "num_experts_per_tok"),
)
# Ends of the names of classes that predict tokens.
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
# Kinds of rotary positions that were renamed.
_ROPE_TYPES = {"mrope": "default", "su": "longrope"}
# What trainers put before the name of a class: FSDP2 makes a class of its own for each that it wraps.
_WRAPPING_CLASS = "fsdp"
_LONGEST = 100


def compare_configs(base: Mapping[str, Any], policy: Mapping[str, Any], where: str) -> list[Problem]:
    """Return the settings of a policy that differ from the base's in meaning.

    A version of transformers may write fewer settings than another, so only those in both are compared.
    """
    kind = "model_type"
    text_only = is_text_of(policy, base)
    rows = [] if text_only else [(kind, base.get(kind), policy.get(kind))]
    if not text_only and not _same_class(_class(base), _class(policy)):
        rows.append(("architectures", base.get("architectures"), policy.get("architectures")))
    rows += [(key, of_text(base, key), of_text(policy, key)) for key in (*_STRUCTURE, *_MEANING)]
    ours, theirs = _rope(base), _rope(policy)
    rows += [(key, value, theirs.get(key)) for key, value in ours.items()]
    return [
        Problem(
            f"`{key}` differs from the base's",
            where,
            cut(mine),
            cut(other),
            resize(other) if key == "vocab_size" else REMEDY,
        )
        for key, mine, other in rows
        if mine != other and (key == kind or (mine is not None and other is not None))
    ]


def is_text_of(policy: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """True if a policy is the text model alone of a base that also sees or hears."""
    text, kind, whole = base.get("text_config"), policy.get("model_type"), base.get("model_type")
    named = text.get("model_type") if isinstance(text, Mapping) else None
    # Releases before version 4.52 of transformers do not name the text model.
    return bool(kind) and kind != whole and kind in (named, f"{whole}_text")


def resize(rows: object) -> str:
    """Return the remedy for a vocabulary of another size: the base gets the policy's number of rows."""
    return (
        f"give as base one with as many rows: base.resize_token_embeddings({rows}), saved. "
        "Rows that this adds count as those from which the policies started"
    )


def cut(value: object) -> str:
    """Return a value as text, shortened."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _class(config: Mapping[str, Any]) -> str:
    """Return the name of a model's class, "" if the config names none."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return first.lower().removeprefix(_WRAPPING_CLASS) if isinstance(first, str) else ""


def _same_class(base: str, policy: str) -> bool:
    """True if both have one task: `model_type` tells families apart, and releases spell a class in several ways."""
    if not base or not policy or base == policy:
        return True
    languages = [one.endswith(tuple(map(str.lower, LANGUAGE_MODELS))) for one in (base, policy)]
    # A class without a head has no task, and heads have tensors of their own.
    bare = [one.endswith("model") and not language for one, language in zip((base, policy), languages, strict=True)]
    return all(languages) or any(bare)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary positions by name, and by kind of layer where those have their own.

    Before version 5 transformers wrote `rope_theta` and `rope_scaling` (`type` for `rope_type`), for Gemma also
    `rope_local_base_freq`; since then `rope_parameters` has all of them.
    """
    given, scaling = of_text(config, "rope_parameters"), of_text(config, "rope_scaling")
    if not isinstance(given, Mapping):
        old = dict(scaling) if isinstance(scaling, Mapping) else {}
        given = {**old, "rope_theta": of_text(config, "rope_theta")}
        if local := of_text(config, "rope_local_base_freq"):
            given = {"full_attention": given, "sliding_attention": {"rope_theta": local}}
    found: dict[str, Any] = {}
    for kind, settings in given.items():
        nested = settings if isinstance(settings, Mapping) else {kind: settings}
        place = f"{kind}." if isinstance(settings, Mapping) else ""
        for key, value in nested.items():
            if key in ("type", "rope_type"):
                found.setdefault(f"rope {place}rope_type", _ROPE_TYPES.get(str(value), value))
            else:
                found[f"rope {place}{key}"] = value
    return found
