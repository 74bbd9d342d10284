"""Models and tokenizers for training: any causal language model, full, LoRA or QLoRA, as TRL's `ModelConfig` says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from trl import ModelConfig, get_peft_config, get_quantization_config

from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.checkpoints.reader import resolve_folder
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.references import looks_local

# What transformers' classifiers call their head.
_HEADS = {"score", "classifier", "pre_classifier", "classification_head", "pooler"}
_SAID = 600


def load_tokenizer(reference: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Raises:
        UserError: there is none, or it cannot be reached.
    """
    return cast(PreTrainedTokenizerBase, _load(AutoTokenizer, reference, "tokenizer", revision=revision))


def load_policy(reference: str, options: ModelConfig) -> PreTrainedModel:
    """Return a causal language model, in the type and with the attention and quantization that `options` name."""
    return cast(PreTrainedModel, _load(AutoModelForCausalLM, reference, "model", **_loading(options)))


def load_classifier(reference: str, options: ModelConfig) -> PreTrainedModel:
    """Return a model with a new head of one logit: the start of a reward model or a critic."""
    loading = _loading(options)
    if "quantization_config" in loading:
        # The head is new, and trained whole.
        loading["quantization_config"].llm_int8_skip_modules = ["score"]
    # transformers reports the missing head, which is as it should be; whatever else is missing is not.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = _load(
            AutoModelForSequenceClassification, reference, "model", num_labels=1, output_loading_info=True, **loading
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = [name for name in found["missing_keys"] if not _HEADS.intersection(name.split("."))]
    if missing:
        raise fail("weights are missing from the model", where=reference, got=", ".join(sorted(missing)[:3]))
    return cast(PreTrainedModel, model)


def load_critic(reference: str, options: ModelConfig) -> PreTrainedModel:
    """Return PPO's value model: the base with a head of one number; with LoRA, only adapters and head are trained."""
    critic = load_classifier(reference, options)
    lora = lora_config(options, critic, task="SEQ_CLS")
    if lora is not None:
        critic.requires_grad_(False)
        # In place, since PPOTrainer looks for the backbone by the name it has in the class.
        critic = cast(PreTrainedModel, inject_adapter_in_model(lora, critic))
        head = cast(torch.nn.Module, critic.score).float().requires_grad_(True)
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
        for name, weight in critic.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
    return critic


def lora_config(options: ModelConfig, model: PreTrainedModel, task: str = "CAUSAL_LM") -> LoraConfig | None:
    """Return PEFT's configuration, or None for full fine-tuning.

    Without `lora_target_modules`, every linear layer of the blocks is adapted.

    Raises:
        UserError: quantized weights without LoRA, or DoRA, which cannot be merged.
    """
    problems = []
    if (options.load_in_4bit or options.load_in_8bit) and not options.use_peft:
        problems.append(Problem("quantized weights cannot be trained", remedy="set `use_peft: true` (QLoRA)"))
    if options.use_dora:
        what = "DoRA's learned magnitudes scale whole columns, and a weighted sum of such adapters is none"
        problems.append(Problem(what, where="use_dora", remedy="set `use_dora: false`"))
    if problems:
        raise UserError(problems)
    config = cast(LoraConfig | None, get_peft_config(options))
    if config is None:
        return None
    config.task_type = task
    if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        # TRL makes a list of one name that name alone, which PEFT takes for a pattern of whole names.
        config.target_modules = [config.target_modules]
    if config.target_modules is None:
        config.target_modules = "all-linear" if task == "CAUSAL_LM" else _linear_layers(model)
    return config


def with_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Return the model with an adapter on it."""
    return cast(PeftModel, get_peft_model(model, config))


def reference_loading(options: ModelConfig) -> dict[str, Any] | None:
    """Return how TRL shall load a reference model to have the policy's own start; None where it does so anyway."""
    usual = {"revision": "main", "dtype": "float32", "attn_implementation": None}
    wanted = {
        "revision": options.model_revision,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
    }
    return None if wanted == usual else {key: value for key, value in wanted.items() if value is not None}


def check_quantization(options: ModelConfig) -> None:
    """Refuse QLoRA where bitsandbytes is not there or cannot run; make it right on a CPU.

    Raises:
        UserError: with what bitsandbytes itself says.
    """
    if not (options.load_in_4bit or options.load_in_8bit):
        return
    where = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
    try:
        import bitsandbytes as bnb

        if not torch.cuda.is_available():
            # On a CPU with AVX512-BF16, a forward pass in evaluation mode packs the weights into a layout that has no
            # gradient, and training goes on from it with a wrong loss.
            bnb.nn.modules.has_avx512bf16 = lambda: False
        _try_quantized(bnb, options.load_in_4bit)
    except Exception as error:  # noqa: BLE001 - a missing kernel or driver raises anything from ImportError up
        raise fail(
            "bitsandbytes cannot quantize on this machine",
            where=where,
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:_SAID]}",
            remedy="pip install 'rewarded-lines[train]', use a GPU that bitsandbytes knows, or train LoRA without "
            f"`{where}`",
        ) from error


def check_start(base: str, options: ModelConfig, project: str) -> None:
    """Refuse a policy that would not start from the project's base: its residual is measured from there.

    Raises:
        UserError: `model_name_or_path` names another model; the message tells a different vocabulary.
    """
    wanted = options.model_name_or_path
    if wanted is None or wanted == base or _same_folder(wanted, base):
        return
    first, second = (_load(AutoConfig, name, "config") for name in (base, wanted))
    sizes = [getattr(config.get_text_config(), "vocab_size", None) for config in (first, second)]
    differ = sizes[0] != sizes[1] or load_tokenizer(base).get_vocab() != load_tokenizer(wanted).get_vocab()
    raise fail(
        "the policy and the SFT model have different vocabularies"
        if differ
        else "the policy would not start from the SFT model",
        where=f"model_name_or_path, and `base` of {project}",
        expected=f"{base} ({sizes[0]} entries)",
        got=f"{wanted} ({sizes[1]} entries)",
        remedy="leave `model_name_or_path` out, or name another `project_file`",
    )


def generation_dtype(options: ModelConfig, model: PreTrainedModel) -> str:
    """Return the type in which responses are sampled outside of the trainer."""
    name = str(model.dtype).removeprefix("torch.")
    wanted = options.dtype if options.dtype not in (None, "auto") else name
    return wanted if wanted in ("float32", "bfloat16", "float16") else "float32"


def fold_classifier(folder: Path, base: str, pad: int | None) -> None:
    """Put the whole classifier in the place of the adapter that is in `folder`, its head included.

    Args:
        folder: of the adapter.
        base: the model under it.
        pad: the padding token that it was trained with, by which it finds the last token of a text.
    """
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    tuned = PeftModel.from_pretrained(model, folder)
    whole = cast(Any, tuned).merge_and_unload()
    # The adapter goes when the whole model is there.
    whole.save_pretrained(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()


def reference_hash(reference: str | None) -> str:
    """Return what tells a model's weights from others: their hash in a folder, the id of a model of the Hub."""
    if reference is None:
        return ""
    return weights_hash(Path(reference)) if Path(reference).is_dir() else reference


def absolute(reference: str | None, revision: str = "main") -> str:
    """Return a local folder by its absolute path, since adapters record their base by it; a Hub id as it is.

    Of another revision than main the folder in the Hub's cache is returned: an id does not say which one is meant.

    Raises:
        UserError: there is no reference, or that revision cannot be had.
    """
    if not reference:
        raise fail("`model_name_or_path` is missing", remedy="name the model to start from, a folder or a Hub id")
    if revision != "main" and not Path(reference).is_dir():
        return str(resolve_folder(reference, revision=revision))
    return str(Path(reference).resolve()) if Path(reference).is_dir() else reference


def _loading(options: ModelConfig) -> dict[str, Any]:
    check_quantization(options)
    arguments: dict[str, Any] = {
        "revision": options.model_revision,
        "dtype": options.dtype if options.dtype in (None, "auto") else getattr(torch, options.dtype),
        "attn_implementation": options.attn_implementation,
    }
    quantization = get_quantization_config(options)
    if quantization is not None:
        arguments["quantization_config"] = quantization
        if torch.cuda.is_available():
            # Quantized weights cannot be moved afterwards.
            from accelerate import PartialState

            arguments["device_map"] = {"": PartialState().local_process_index}
    return arguments


def _load(kind: Any, reference: str, what: str, **arguments: Any) -> Any:
    """Load by one of transformers' auto classes; what it raises becomes one message."""
    if looks_local(reference) and not Path(reference).is_dir():
        raise fail(
            f"no {what} there",
            where=reference,
            expected="a model's folder, or a Hub id organisation/name",
            remedy="train it first, or check the path",
        )
    try:
        return kind.from_pretrained(reference, **arguments)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        said = " ".join(str(error).split())
        network = not Path(reference).is_dir() and any(
            word in said.lower() for word in ("connect", "offline", "couldn't reach", "cached files", "timed out")
        )
        raise fail(
            f"the {what} cannot be reached" if network else f"the {what} cannot be loaded",
            where=reference,
            got=f"{type(error).__name__}: {said[:_SAID]}",
            remedy="check the network (HF_HUB_OFFLINE, HF_ENDPOINT), or name a local folder" if network else "",
        ) from error


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of a classifier's linear layers but its head, which PEFT's "all-linear" would adapt as well."""
    kinds: Mapping[str, torch.nn.Module] = dict(model.named_modules())
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in kinds.items()
            if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D") and "." in name
        }
    )


def _try_quantized(bnb: Any, four_bits: bool) -> None:
    """Quantize and multiply a small layer: whether that works shows only when it is done."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bnb.nn.Linear4bit(64, 64, bias=False) if four_bits else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer = layer.to(device)
    with torch.no_grad():
        result = layer(torch.ones(1, 64, device=device, dtype=torch.bfloat16 if four_bits else torch.float16))
    if not torch.isfinite(result).all():
        raise RuntimeError("a quantized layer gives values that are not finite")


def _same_folder(first: str, second: str) -> bool:
    return Path(first).is_dir() and Path(second).is_dir() and Path(first).samefile(second)
