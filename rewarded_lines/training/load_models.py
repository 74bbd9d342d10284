"""Models and tokenizers for training: language models and classifiers, full, LoRA or QLoRA."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from rewarded_lines.checkpoints.reader import resolve_folder
from rewarded_lines.engines.tokenizers import attention_of
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.extras import install
from rewarded_lines.references import looks_local
from rewarded_lines.rewards.classifier_backends import without_load_report

# The names of the head in transformers' classifiers.
_HEADS = {"score", "classifier", "pre_classifier", "classification_head", "pooler"}
_LONGEST_MESSAGE = 600
_NETWORK_ERRORS = ("connect", "offline", "couldn't reach", "cached files", "timed out")


def load_tokenizer(reference: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """Return a model's tokenizer."""
    return _load(AutoTokenizer, reference, "tokenizer", revision=revision)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer without the padding and truncation that batches leave in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    # The trainer may have saved a chat template that this tokenizer does not have.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def load_policy(reference: str, options: ModelConfig) -> PreTrainedModel:
    """Return a causal language model with the dtype, attention and quantization of `options`."""
    model: PreTrainedModel = _load(AutoModelForCausalLM, reference, "model", **_loading(options))
    _check_dtype(model, reference, options)
    return model


def load_classifier(reference: str, options: ModelConfig) -> PreTrainedModel:
    """Return a model with a new head of one logit, to train a reward model or a critic from."""
    loading = _loading(options)
    if "quantization_config" in loading:
        # The new head is trained whole.
        loading["quantization_config"].llm_int8_skip_modules = ["score"]
    # The head is missing; any other missing weight is refused below.
    with without_load_report():
        model, found = _load(
            AutoModelForSequenceClassification, reference, "model", num_labels=1, output_loading_info=True, **loading
        )
    _check_dtype(model, reference, options)
    missing = [name for name in found["missing_keys"] if not _HEADS.intersection(name.split("."))]
    if missing:
        raise fail("weights are missing from the model", where=reference, got=", ".join(sorted(missing)[:3]))
    return model


def _check_dtype(model: PreTrainedModel, reference: str, options: ModelConfig) -> None:
    """Refuse to train all weights in float16: the squares of small gradients are 0 there, and AdamW divides by them."""
    if model.dtype == torch.float16 and not options.use_peft:
        raise fail(
            "whole models cannot be trained in float16: their weights become infinite",
            where="dtype",
            got=f"{options.dtype}, for {reference}",
            remedy="write `dtype: float32` or `dtype: bfloat16`, or train LoRA with `use_peft: true`",
        )


def load_critic(base: str, options: ModelConfig, start: str | None = None) -> PreTrainedModel:
    """Return PPO's value model, with a head of one number; LoRA trains adapters and head, in float32.

    It begins as the SFT model, or as the reward model `start`, which must have the same tokens.
    """
    if start is not None and not load_tokenizer(base).get_vocab().items() <= load_tokenizer(start).get_vocab().items():
        raise fail(
            "the critic would take the policy's tokens for others",
            where="critic_model",
            expected=f"a model with the tokenizer of {base}",
            got=start,
            remedy="name a reward model that was trained from the SFT model, or leave it out",
        )
    # Not by the first process alone: FSDP would share out the weights of its own models only.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        critic: Any = load_classifier(start or base, options)
    lora = lora_config(options, task="SEQ_CLS")
    if lora is not None:
        critic.requires_grad_(False)
        # In place: the trainer finds the body by an attribute that PEFT's wrapper lacks.
        critic = inject_adapter_in_model(lora, critic)
        head = critic.score.float().requires_grad_(True)
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
        for name, weight in critic.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
    return critic


def lora_config(options: ModelConfig, task: str = "CAUSAL_LM") -> LoraConfig | None:
    """Return PEFT's configuration, by default for all linear layers but the head; None without LoRA."""
    problems = []
    if (options.load_in_4bit or options.load_in_8bit) and not options.use_peft:
        problems.append(Problem("quantized weights cannot be trained", remedy="set `use_peft: true` (QLoRA)"))
    if options.use_dora:
        what = "DoRA's learned magnitudes scale whole columns, so a weighted sum of such adapters is no DoRA adapter"
        problems.append(Problem(what, where="use_dora", remedy="set `use_dora: false`"))
    if problems:
        raise UserError(problems)
    config: Any = get_peft_config(options)
    if config is None:
        return None
    config.task_type = task
    wanted = config.target_modules
    # LLaMA-Factory's word for all is the second.
    if wanted in (None, "all"):
        config.target_modules = "all-linear"
    elif isinstance(wanted, str) and all(name.strip().isidentifier() for name in wanted.split(",")):
        # TRL turns a list of one name into a text, which PEFT would match against full names; others write commas.
        config.target_modules = [name.strip() for name in wanted.split(",")]
    return config


def reward_lora(options: ModelConfig, model: PreTrainedModel) -> LoraConfig | None:
    """Return PEFT's configuration for a reward model, whose head is trained whole; None without LoRA."""
    config = lora_config(options, task="SEQ_CLS")
    if config is not None:
        config.modules_to_save = ["score"]
        if config.target_modules == "all-linear" and hasattr(model, "pre_classifier"):
            # PEFT trains this layer of DistilBERT's head whole, since its name ends with "classifier".
            config.exclude_modules = ["pre_classifier"]
    return config


def reference_loading(options: ModelConfig) -> dict[str, Any] | None:
    """Return arguments for TRL to load the reference model like the policy; None for its defaults."""
    given = {key: value for key, value in _wanted(options).items() if value is not None}
    return None if given == {"revision": "main", "dtype": "float32"} else given


def check_quantization(options: ModelConfig) -> None:
    """Refuse QLoRA if bitsandbytes is missing or does not work here; correct its training on a CPU."""
    if not (options.load_in_4bit or options.load_in_8bit):
        return
    key = "load_in_4bit" if options.load_in_4bit else "load_in_8bit"
    try:
        import bitsandbytes as bnb

        if not torch.cuda.is_available():
            # On a CPU with AVX512-BF16, evaluation packs the weights into a layout without a gradient.
            # Training then continues with a wrong loss.
            bnb.nn.modules.has_avx512bf16 = lambda: False
        _try_quantized(bnb, options.load_in_4bit)
    except Exception as error:  # noqa: BLE001 - a missing kernel or driver raises anything from ImportError up
        raise fail(
            "bitsandbytes cannot quantize on this machine",
            where=key,
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST_MESSAGE]}",
            remedy=install("train", "or use a GPU that bitsandbytes supports", f"or train LoRA without `{key}`"),
        ) from error


def check_start(base: str, options: ModelConfig, project: str) -> None:
    """Refuse a `model_name_or_path` that is not the project's base, to which merging needs a residual."""
    wanted = options.model_name_or_path
    if wanted is None or wanted == base:
        return
    if Path(wanted).is_dir() and Path(base).is_dir() and Path(wanted).samefile(base):
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
    """Return the dtype in which responses are sampled outside of the trainer."""
    name = str(model.dtype).removeprefix("torch.")
    wanted = options.dtype if options.dtype not in (None, "auto") else name
    return wanted if wanted in ("float32", "bfloat16", "float16") else "float32"


def fold_classifier(folder: Path, base: str, pad: int | None) -> None:
    """Replace the adapter in `folder`, trained on `base`, by the whole classifier with its head.

    The classifier finds the last token of a text by `pad`, the padding token of its training.
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32, trust_remote_code=False
    )
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    tuned: Any = PeftModel.from_pretrained(model, folder)
    whole = tuned.merge_and_unload()
    # The adapter is removed only after the whole model is saved.
    whole.save_pretrained(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()


def absolute(reference: str | None, revision: str = "main") -> str:
    """Return a folder's absolute path, by which adapters record their base; a Hub id as it is.

    Another revision than main is a folder in the Hub's cache, since an id does not name it.
    """
    if not reference:
        raise fail("`model_name_or_path` is missing", remedy="name the model to start from, a folder or a Hub id")
    if Path(reference).is_dir():
        return str(Path(reference).resolve())
    return reference if revision == "main" else str(resolve_folder(reference, revision=revision))


def _wanted(options: ModelConfig) -> dict[str, Any]:
    names = {"revision": "model_revision", "dtype": "dtype", "attn_implementation": "attn_implementation"}
    return {key: getattr(options, name) for key, name in names.items()}


def _loading(options: ModelConfig) -> dict[str, Any]:
    check_quantization(options)
    arguments = _wanted(options)
    if (quantization := get_quantization_config(options)) is not None:
        arguments["quantization_config"] = quantization
        if torch.cuda.is_available():
            # Quantized weights cannot be moved later.
            from accelerate import PartialState

            arguments["device_map"] = {"": PartialState().local_process_index}
    return arguments


def _load(kind: Any, reference: str, what: str, **arguments: Any) -> Any:
    """Load with one of transformers' auto classes; its errors become one `UserError`."""
    if looks_local(reference) and not Path(reference).is_dir():
        raise fail(
            f"no {what} there",
            where=reference,
            expected="a model's folder, or a Hub id organisation/name",
            remedy="train it first, or check the path",
        )
    if arguments.get("attn_implementation", "") is None:
        # What has no config cannot be loaded, which is told below.
        with suppress(OSError, ValueError):
            config = AutoConfig.from_pretrained(reference, revision=arguments["revision"], trust_remote_code=False)
            arguments |= attention_of(config)
    try:
        return kind.from_pretrained(reference, trust_remote_code=False, **arguments)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        message = " ".join(str(error).split())
        network = not Path(reference).is_dir() and any(word in message.lower() for word in _NETWORK_ERRORS)
        raise fail(
            f"the {what} cannot be reached" if network else f"the {what} cannot be loaded",
            where=reference,
            got=f"{type(error).__name__}: {message[:_LONGEST_MESSAGE]}",
            remedy="check the network (HF_HUB_OFFLINE, HF_ENDPOINT), or name a local folder"
            if network
            else "name a model of a class that transformers has: the code in a model's folder is not run here"
            if "trust_remote_code" in message
            else "",
        ) from error


def _try_quantized(bnb: Any, four_bits: bool) -> None:
    """Quantize and multiply a small layer: only that shows whether it works."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bnb.nn.Linear4bit(64, 64, bias=False) if four_bits else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer = layer.to(device)
    with torch.no_grad():
        result = layer(torch.ones(1, 64, device=device, dtype=torch.bfloat16 if four_bits else torch.float16))
    if not torch.isfinite(result).all():
        raise RuntimeError("a quantized layer gives values that are not finite")
