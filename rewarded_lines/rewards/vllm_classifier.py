"""Runs a classifier in vLLM's pooling engine, in this process."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.reader import resolve_folder
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.engines.vllm_process import check_gpu, end_vllm, take_turn, vllm_device
from rewarded_lines.engines.vllm_versions import start_vllm
from rewarded_lines.errors import fail
from rewarded_lines.extras import require
from rewarded_lines.out_of_memory import empty_cache
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_backends import Ids, cannot_load, no_classifier
from rewarded_lines.rewards.model_sizes import LONGEST, engine_size, weights_size
from rewarded_lines.rewards.reward_checkpoints import RewardCheckpoint, tokenizer_of
from rewarded_lines.rewards.reward_heads import head_rows

_FOLD = (
    'python -c "from peft import PeftModel; from transformers import AutoModelForSequenceClassification as M; '
    "from transformers import AutoTokenizer as T; model = M.from_pretrained({base!r}, num_labels={rows}); "
    "PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload().save_pretrained({out!r}); "
    'T.from_pretrained({tokenizer!r}).save_pretrained({out!r})"'
)


class VllmClassifier:
    """A classifier in vLLM; with the attributes of `HuggingFaceClassifier`.

    vLLM chooses its batches itself, so the other texts can change the last bits of a score.
    """

    def __init__(self, where: str, spec: RewardSpec, stored: RewardCheckpoint, device: str, *unused: Any) -> None:
        """Build the engine; check first that vLLM can run the model on the device."""
        check_vllm(where, device)
        _check_form(where, spec, stored)
        reference = stored.reference
        config = _read_config(where, reference)
        self.classes = [str(config.id2label[at]) for at in sorted(config.id2label)]
        self.pad: int | None = None if stored.reads_last else config.get_text_config().pad_token_id
        limits = (spec.max_tokens, positions_of(config), LONGEST)
        self.longest: int | None = min(limit for limit in limits if limit)
        weights = weights_size(str(resolve_folder(reference)), spec, config)
        needed, self.size = engine_size(config, spec, weights, self.longest, device)
        options: dict[str, Any] = {"dtype": spec.dtype, "max_model_len": self.longest}
        try:
            self._llm = start_vllm(needed, model=reference, runner="pooling", convert="classify", **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise cannot_load(where, reference, error, "use `backend: hf`") from error
        # The engine ends when this object is collected or Python exits.
        self._shut_down = weakref.finalize(self, end_vllm, self._llm)

    def logits(self, ids: Ids, types: Ids | None = None) -> list[list[float]]:
        """Return the logits of each text; decoders have no token types."""
        from vllm import PoolingParams

        # By default, vLLM returns a sigmoid or softmax of the logits.
        params = PoolingParams(use_activation=False)
        inputs = [{"prompt_token_ids": list(row)} for row in ids]
        take_turn(self._llm)
        outputs = self._llm.classify(inputs, pooling_params=params, use_tqdm=False)
        return [[float(logit) for logit in output.outputs.probs] for output in outputs]

    def close(self) -> None:
        """Free the memory."""
        self._shut_down()
        del self._llm
        empty_cache()


def check_vllm(where: str, device: str) -> None:
    """Refuse vLLM where it is missing, of another version, or runs on another device."""
    require("vllm", f"{where}, backend: vllm", otherwise="or use `backend: hf`")
    check_gpu(f"{where}, backend: vllm")
    own = vllm_device()
    if device not in (own, f"{own}:0"):
        raise fail(
            "vLLM runs on another device",
            where=f"{where}, backend: vllm",
            expected=own,
            got=device,
            remedy=f"declare `device: {own}`, use `backend: hf`, or set CUDA_VISIBLE_DEVICES",
        )


def _check_form(where: str, spec: RewardSpec, stored: RewardCheckpoint) -> None:
    """Refuse what vLLM would not read as transformers does."""
    own = "a model with code of its own" if spec.trust_remote_code else ""
    if form := stored.form or own or ("a head whose value is normalized" if stored.normalized else ""):
        command = _fold_command(stored)
        raise fail(
            "vLLM does not read this reward model",
            where=f"{where}, backend: vllm",
            expected="a whole classifier of transformers",
            got=f"{stored.reference}, {form}",
            remedy=f"use `backend: hf`{command and ', or make it a whole model: '}{command}",
        )


def _fold_command(checkpoint: RewardCheckpoint) -> str:
    """Return the command that makes a whole classifier of an adapter; "" if transformers has no class for that."""
    if not checkpoint.adapter or checkpoint.head:
        return ""
    out = checkpoint.reference if Path(checkpoint.reference).is_dir() else Path(checkpoint.reference).name
    return _FOLD.format(
        base=checkpoint.base,
        rows=head_rows(checkpoint) or 1,
        adapter=checkpoint.reference,
        tokenizer=tokenizer_of(checkpoint),
        out=f"{out.rstrip('/')}-whole",
    )


def _read_config(where: str, reference: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(reference, trust_remote_code=False)
    architecture = (config.architectures or ["none"])[0]
    # vLLM would classify with a language model's yes and no tokens, or with a random head.
    if not architecture.endswith("ForSequenceClassification"):
        raise no_classifier(where, f"{reference}, whose architecture is {architecture}")
    if config.is_encoder_decoder or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        # For logits, vLLM skips the activation of BERT's pooler, for example.
        raise fail(
            "vLLM gives encoders other scores than transformers",
            where=f"{where}, backend: vllm",
            expected="a decoder",
            got=f"{reference}, a {config.model_type}",
            remedy="use `backend: hf`",
        )
    return config
