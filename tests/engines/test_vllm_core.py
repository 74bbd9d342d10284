"""Log-probabilities of tails from vLLM's outputs for rows that share prefixes, in both forms of output."""

import random
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")

from vllm.logprobs import FlatLogprobs, Logprob

from rewarded_lines.engines.vllm_models import VllmGenerator

BLOCK = 4


def logprob(prefix, token):
    """Return an invented log-probability of a token after a prefix."""
    return -random.Random(repr((tuple(prefix), token))).random()


class Fake(VllmGenerator):
    """Caches whole blocks of earlier rows, as vLLM does, and computes no probabilities for them."""

    def __init__(self, computed_only):
        self.computed_only = computed_only
        self.cached = []

    def _run(self, rows, params, adapters):
        known, found = set(), []
        for row, one in zip(rows, params, strict=True):
            whole = [tuple(row[:end]) for end in range(BLOCK, len(row), BLOCK)]
            hits = 0 if one.skip_reading_prefix_cache else sum(prefix in known for prefix in whole)
            known |= set(whole)
            cached = hits * BLOCK
            entries = [None] * (cached + 1)
            entries += [
                {row[place]: Logprob(logprob(row[:place], row[place]))} for place in range(cached + 1, len(row))
            ]
            self.cached.append(cached)
            answers = FlatLogprobs()
            answers.extend(entries[cached:] if self.computed_only else entries)
            found.append(SimpleNamespace(num_cached_tokens=cached, prompt_logprobs=answers))
        return found


@pytest.mark.parametrize("computed_only", [False, True], ids=["all tokens", "computed ones"])
def test_shared_prefixes_change_no_score(computed_only):
    draw = random.Random(0)
    heads = [[draw.randrange(3) for _ in range(length)] for length in (1, 3, 4, 6, 9, 13)]
    pairs = [(draw.choice(heads), [draw.randrange(3) for _ in range(draw.randrange(8))]) for _ in range(200)]
    core = Fake(computed_only)
    expected = [sum(logprob((head + tail)[:i], (head + tail)[i]) for i in range(len(head), len(head + tail)))
                for head, tail in pairs]  # fmt: skip
    assert core._logprobs(pairs, None) == pytest.approx(expected)
    # Some tokens were cached, and some rows were scored again.
    rows = len({(tuple(head), tuple(tail)) for head, tail in pairs})
    assert sum(core.cached[:rows]) > 200 and rows < len(core.cached) < 1.5 * rows
