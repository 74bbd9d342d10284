"""Several models that answer as one: at every step their logits are mixed, and each model keeps its own cache (MOD).

    log π(y_t | x, y_<t) = Σᵢ λᵢ log πᵢ(y_t | x, y_<t) − log Z_t,    Σᵢ λᵢ = 1

log πᵢ are the logits lᵢ minus one number for each step, so Σᵢ λᵢ lᵢ are logits of the same π. If one λᵢ is 1 they are
the model's own, which also a repetition penalty sees.

Source: Shi et al., "Decoding-Time Language Model Alignment with Multiple Objectives", arXiv 2406.18853, the case of the
reverse KL: the optimum of Σ λᵢ rᵢ, where πᵢ are the optima of rᵢ with one SFT model and one KL coefficient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# The arguments and outputs of transformers' models that hold what they have read.
_CACHES = ("past_key_values", "cache_params", "state")


@contextmanager
def mixed(leader: Any, weight: float, others: Sequence[tuple[float, Any]]) -> Iterator[None]:
    """Let `leader` return λ·logits + Σ λᵢ·logitsᵢ in float32 in the block, also inside its `generate`.

    Every forward pass of the leader, with the weight λ, is repeated by the others with the same arguments, apart from
    the cache. They have the leader's architecture, and are on its device.
    """
    # The leader's cache after its last pass, and those of the others.
    last: Any = None
    own: list[Any] = []

    def before(_: Any, __: Any, given: dict[str, Any]) -> None:
        # Begin with empty caches where the leader does: an unknown cache is a new one.
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        if cache is None or cache is not last:
            own[:] = [copy.deepcopy(cache) for _ in others]

    def after(_: Any, args: Any, given: dict[str, Any], output: Any) -> Any:
        nonlocal last
        total = weight * output.logits.float()
        passed = next((name for name in _CACHES if given.get(name) is not None), None)
        made = next((name for name in _CACHES if output.get(name) is not None), None)
        for place, (share, model) in enumerate(others):
            answer = model(*args, **{**given, **({passed: own[place]} if passed else {})})
            total += share * answer.logits.float()
            own[place] = answer[made] if made else None
        last = output[made] if made else None
        output.logits = total
        return output

    first = leader.register_forward_pre_hook(before, with_kwargs=True)
    second = leader.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        first.remove()
        second.remove()
