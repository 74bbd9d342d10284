"""The moving reference of TRL's `sync_ref_model` in checkpoints, which TRL leaves out, and what it cannot do.

The KL penalty is then to an average of the policy (WARP, arXiv 2406.16768, section 3.1; TR-DPO, arXiv 2404.09656):

    θ_ref ← (1 − μ)·θ_ref + μ·θ    every `ref_model_sync_steps` steps,    μ = `ref_model_mixup_alpha`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

from rewarded_lines.errors import fail

_FILE = "reference.safetensors"


def check_reference(training: Any, adapter: bool) -> None:
    """Refuse a moving reference for an adapter, whose reference is the model without it, and one that nothing reads."""
    if not getattr(training, "sync_ref_model", False):
        return
    # PPO's `beta` is TRL's default, which it ignores.
    weight = "kl_coef" if hasattr(training, "kl_coef") else "beta"
    if not getattr(training, weight, 1.0):
        what = "without a KL penalty there is no reference that could move"
        raise fail(what, where="sync_ref_model", got=f"{weight}: 0", remedy=f"raise `{weight}`, or leave it out")
    if getattr(training, "precompute_ref_log_probs", False):
        what, remedy = "a reference that moves cannot answer before", "leave `precompute_ref_log_probs` out"
        raise fail(what, where="sync_ref_model", got="precompute_ref_log_probs: true", remedy=remedy)
    if adapter:
        remedy = "leave it out, or train whole models: `use_peft: false`"
        raise fail("an adapter's reference is its base, which cannot move", where="sync_ref_model", remedy=remedy)


class MovingReference:
    """Saves the reference with each checkpoint and reads it back; a class names it before TRL's trainer."""

    accelerator: Any
    args: Any
    is_deepspeed_enabled: Any
    is_fsdp_enabled: Any
    ref_model: Any

    def __init__(self, *args: Any, **parts: Any) -> None:
        """Build TRL's trainer; refuse a moving reference that checkpoints could not keep."""
        trl: Any = super()
        trl.__init__(*args, **parts)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self._moves and sharded and self.args.save_strategy != "no":
            what = "checkpoints cannot keep the moving reference of FSDP or DeepSpeed"
            raise fail(what, where="sync_ref_model", remedy='set `save_strategy: "no"`, or use DDP')

    @property
    def _moves(self) -> bool:
        return bool(getattr(self.args, "sync_ref_model", False))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trl: Any = super()
        trl._save_optimizer_and_scheduler(output_dir)
        if self._moves and self.args.should_save:
            save_model(self.accelerator.unwrap_model(self.ref_model), str(Path(output_dir, _FILE)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trl: Any = super()
        trl._load_optimizer_and_scheduler(checkpoint)
        if self._moves and checkpoint is not None:
            path = Path(checkpoint, _FILE)
            if not path.is_file():
                what, remedy = "a checkpoint without the moving reference", "remove it, or name another output_dir"
                raise fail(what, where=checkpoint, expected=_FILE, remedy=remedy)
            load_model(self.accelerator.unwrap_model(self.ref_model), str(path))
