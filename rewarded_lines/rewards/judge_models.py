"""The causal models of judges, each in memory once for all rewards that ask it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapter_config import read_adapter_config
from rewarded_lines.checkpoints.adapters import is_adapter
from rewarded_lines.checkpoints.hashing import model_hash
from rewarded_lines.checkpoints.reader import resolve_folder
from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.lengths import positions_of
from rewarded_lines.engines.base import Workload
from rewarded_lines.engines.tokenizers import base_model, load_config, load_tokenizer
from rewarded_lines.errors import fail
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_backends import cannot_load, with_dtype
from rewarded_lines.rewards.judge_engines import HfJudge, JudgeEngine, VllmJudge
from rewarded_lines.rewards.model_sizes import LONGEST, engine_size, refuse_too_large, weights_size
from rewarded_lines.rewards.shared_model import SharedModel
from rewarded_lines.rewards.text_batches import TextBatches
from rewarded_lines.rewards.vllm_classifier import check_vllm


class JudgeModel(SharedModel[JudgeEngine]):
    """A causal model with an engine."""

    def __init__(self, where: str, spec: RewardSpec, reference: str, device: str, beside: Mapping[str, Any]) -> None:
        """Load nothing yet; see `SharedModel`."""
        super().__init__(where, reference, device, beside)
        self._config = load_config(reference)
        self._spec = with_dtype(where, spec, self._config)
        self._shapes = TextBatches(where, device, self._spec)
        refuse_too_large(where, base_model(reference), self._spec, self._config, device)
        limits = [spec.max_tokens, positions_of(self._config), LONGEST if spec.backend == "vllm" else None]
        self.longest = min((limit for limit in limits if limit), default=None)

    def _build(self) -> JudgeEngine:
        return self._vllm() if self._spec.backend == "vllm" else self._transformers()

    def _content(self) -> str:
        return _content(self._reference)

    def _work(self) -> Workload:
        spec = GenerationSpec(dtype=self._spec.dtype, max_tokens=1)
        return Workload(self._reference, spec, (), longest=(self.longest or 1) - 1)

    def _transformers(self) -> HfJudge:
        model = load_causal(self._where, self._spec, self._reference).to(self.device)
        held = [*model.parameters(), *model.buffers()]
        self.size = sum(tensor.numel() * tensor.element_size() for tensor in held)
        loaded = model, load_tokenizer(self._reference, GenerationSpec())
        return HfJudge(self._work(), loaded, self._shapes)

    def _vllm(self) -> VllmJudge:
        check_vllm(self._where, self.device)
        weights = weights_size(str(resolve_folder(base_model(self._reference))), self._spec, self._config)
        needed, self.size = engine_size(self._config, self._spec, weights, self.longest or LONGEST, self.device)
        try:
            return VllmJudge(self._work(), needed)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise cannot_load(self._where, self._reference, error, "use `backend: hf`") from error


def share_judge(known: dict[str, Any], where: str, spec: RewardSpec, reference: str, device: str) -> JudgeModel:
    """Return the model in `known` that another reward asks, too, or a new one."""
    key = repr(
        ("judge", reference, device, spec.backend, spec.dtype, spec.batch_size, spec.max_tokens, spec.batch_tokens)
    )
    if key not in known:
        known[key] = JudgeModel(where, spec, reference, device, known)
    found: JudgeModel = known[key]
    return found


def load_causal(where: str, spec: RewardSpec, reference: str) -> Any:
    """Return a causal model in evaluation mode; refuse one whose head would be random."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            reference, dtype=getattr(torch, spec.dtype), output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise cannot_load(where, reference, error) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise fail(
            "not a language model: weights are missing",
            where=where,
            expected="a causal model with its head",
            got=f"{reference} without {', '.join(missing[:3])}",
            remedy="declare a classifier with `model:` in place of `judge:`",
        )
    return model.eval()


def _content(reference: str) -> str:
    """Return a hash of a judge's folder, its base's included, or the commit of a Hub model."""
    from transformers.utils import cached_file

    folder = Path(reference)
    if not folder.is_dir():
        # The name of the commit's folder in the Hub's cache.
        return Path(str(cached_file(reference, "config.json"))).parent.name
    base = [_content(read_adapter_config(folder).base)] if is_adapter(folder) else []
    return ":".join([model_hash(folder), *base])
