"""LoRA layers on a CPU: what tokens grouped by adapter give is what vLLM's own layers give."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarded_lines.engines import cpu_adapters

ops = pytest.importorskip("vllm.lora.ops.torch_ops")
SLOTS, RANK, WIDTH = 4, 3, 6
RUNS = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 4)), min_size=1, max_size=8)


def arrays(tokens, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, WIDTH, generator=draw),
        torch.randn(SLOTS, 1, RANK, WIDTH, generator=draw),
        torch.randn(tokens, RANK, generator=draw),
        torch.randn(SLOTS, 1, WIDTH, RANK, generator=draw),
        torch.randn(tokens, 2 * WIDTH, generator=draw),
    )


@settings(max_examples=60)
@given(RUNS, st.booleans(), st.sampled_from((0, 256)))
def test_each_token_meets_its_own_adapter(runs, add, few):
    slots = torch.tensor([slot for slot, count in runs for _ in range(count)])
    x, a, inner, b, before = arrays(len(slots))
    # In one product, or one for each adapter.
    with patch.object(cpu_adapters, "_FEW_ROWS", few), patch.object(cpu_adapters, "_last", None):
        found, expected = torch.zeros(len(slots), RANK), torch.zeros(len(slots), RANK)
        cpu_adapters.shrink(x, a, found, slots, 0.5)
        ops.bgmv_shrink(x, a, expected, slots, 0.5)
        expected[slots < 0] = 0
        torch.testing.assert_close(found, expected)
        for mine, theirs, rest in (
            (cpu_adapters.expand_slice, ops.bgmv_expand_slice, (4, WIDTH, add)),
            (cpu_adapters.expand, ops.bgmv_expand, (add,)),
        ):
            found, expected = before.clone(), before.clone()
            mine(inner, b, found, slots, *rest)
            theirs(inner, b, expected, slots, *rest)
            # vLLM gives tokens without an adapter that of the last slot.
            expected[slots < 0] = before[slots < 0]
            torch.testing.assert_close(found, expected)


@given(RUNS)
@settings(max_examples=20)
def test_sequences_are_their_tokens(runs):
    slots, lengths = (torch.tensor(column) for column in zip(*runs, strict=True))
    total = int(lengths.sum())
    x, a, inner, b, before = arrays(total)
    about = (lengths.cumsum(0) - lengths, lengths, slots, len(runs), int(lengths.max()), total)
    for name, inputs, factors, start, rest in (
        ("sgmv_shrink", x, a, torch.zeros(total, RANK), (2.0,)),
        ("sgmv_expand_slice", inner, b, before, (4, WIDTH, True)),
        ("sgmv_expand", inner, b, before, (True,)),
    ):
        found, expected = start.clone(), start.clone()
        cpu_adapters.FUNCTIONS[name](inputs, factors, found, *about, *rest)
        getattr(ops, name)(inputs, factors, expected, *about, *rest)
        without = slots.repeat_interleave(lengths) < 0
        expected[without] = start[without]
        torch.testing.assert_close(found, expected)


def test_vllm_uses_them_once_asked(monkeypatch):
    from vllm.lora.punica_wrapper import punica_cpu

    for name in cpu_adapters.FUNCTIONS:
        monkeypatch.setattr(punica_cpu, name, getattr(punica_cpu, name))
    cpu_adapters.group_adapters()
    assert all(getattr(punica_cpu, name) is function for name, function in cpu_adapters.FUNCTIONS.items())
