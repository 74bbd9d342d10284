"""The tables of an inspection: aligned, at most 80 columns wide, and true at the edges of what they round."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from rewarded_lines.merger.inspect import InspectedTensor, Inspection, Level, Residual, Sum
from rewarded_lines.merger.lines_schedule import Schedule
from rewarded_lines.reports.inspection_tables import as_dict, on_terminal

LARGE = 70_553_706_496


def make_residual(norm: float = 1.2345e-5, changed: int = LARGE) -> Residual:
    return Residual(norm, 1.0, 2 * norm, LARGE, changed)


def make_inspection(blocks: dict[str, int], residual: Residual | None) -> Inspection:
    types = ("bfloat16", "float32")
    rows = [(stack, block) for stack, count in blocks.items() for block in range(count)]
    levels = [Level(1234, LARGE, 2 * LARGE, types, residual, s, b, "in", 1.0123456, ()) for s, b in rows]
    tensors = [
        InspectedTensor(
            f"{s}.{b}.self_attn.v_proj.weight", s, b, "in", (28_672, 8192), "bfloat16", LARGE, 1.0, residual
        )
        for s, b in rows
    ]
    levels.insert(0, Level(1, LARGE, LARGE, types, residual, rows[0][0], None, "before", 1.0, ("embed_tokens",)))
    total = Sum(len(rows), LARGE, 2 * LARGE, types, residual)
    base = "sft" if residual else None
    return Inspection("policy", base, Schedule(), {}, blocks, levels, total, tensors, None, [])


def lines(inspection: Inspection, tensors: bool = False) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=80)
    for part in on_terminal(inspection, tensors):
        console.print(part)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("residual", [None, make_residual()])
def test_a_very_large_model_fits_80_columns(residual: Residual | None, tensors: bool) -> None:
    table = lines(
        make_inspection({"vision_tower.vision_model.encoder.layers": 2, "model.layers": 101}, residual), tensors
    )
    assert max(map(len, table)) <= 80
    # Nothing is cut, and only names of tensors are folded.
    assert sum(line.startswith("100 ") for line in table) == 1
    assert not any("…" in line for line in table)
    if residual and not tensors:
        assert "100      1,234 70,553,706,496    BF16 1.012 1.234e-05 0.00123%    100% 2.469e-05" in table


def test_the_tables_of_several_lists_are_aligned() -> None:
    table = lines(make_inspection({"encoder.block": 12, "decoder.block": 2}, make_residual(3.0)))
    rows = [line for line in table if "BF16" in line]
    assert len(rows) == 16 and len({line.index("BF16") for line in rows}) == 1
    assert "encoder.block: 12 blocks" in table and "decoder.block: 2 blocks" in table


@pytest.mark.parametrize(
    ("changed", "expected"),
    [(0, "0%"), (1, "0.1%"), (LARGE // 2, "50.0%"), (LARGE - 1, "99.9%"), (LARGE, "100%")],
)
def test_none_and_all_are_said_only_where_they_are(changed: int, expected: str) -> None:
    table = lines(make_inspection({"h": 1}, make_residual(changed=changed)))
    assert next(line for line in table if line.startswith("total")).split()[-2] == expected


def test_what_is_not_finite_is_shown_and_is_null_in_json() -> None:
    inspection = make_inspection({"h": 1}, Residual(math.nan, 0.0, math.inf, LARGE, 1, 1))
    row = next(line for line in lines(inspection) if line.startswith("total")).split()
    assert (row[-4], row[-3], row[-1]) == ("nan", "–", "inf")
    residual = json.loads(json.dumps(as_dict(inspection, tensors=False), allow_nan=False))["total"]["residual"]
    assert (residual["norm"], residual["scaled_norm"], residual["nonfinite"]) == (None, None, 1)
