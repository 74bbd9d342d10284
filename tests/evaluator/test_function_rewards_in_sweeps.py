"""A sweep with functions as people have them: async ones for TRL, ready ones, each row's own columns."""

import json

import yaml

from rewarded_lines import sweep

FUNCTIONS = """
async def first_letters(completions, answer, **kwargs):
    return [float(len(text)) + level for text, level, _ in zip(completions, kwargs["level"], answer, strict=True)]
"""


def test_a_sweep_with_functions_of_every_kind(tiny):
    rows = [
        {"prompt": "one of the", "answer": letter, "level": 10 * at, "pattern": letter}
        for at, letter in enumerate("eat")
    ]
    (tiny / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tiny / "asked.py").write_text(FUNCTIONS)
    project = yaml.safe_load((tiny / "rewarded-lines.yaml").read_text())
    rewards = {
        "asked": {"function": "asked.py:first_letters"},
        "found": {"function": "regex", "options": {"match": "count"}},
        "long": {"function": "length", "options": {"unit": "characters", "target": 20}},
        "never": {"function": "regex", "options": {"pattern": "\\d{9}"}, "role": "audit"},
    }
    sweeps = {"points": 2, "methods": ["policies"]}
    content = {**project, "rewards": rewards, "prompts": {"file": "rows.jsonl"}, "sweep": sweeps}
    (tiny / "rewarded-lines.yaml").write_text(yaml.safe_dump(content))
    run = sweep(engine="hf")
    for point in run.points:
        own = list(zip(point.responses, rows, strict=True))
        assert point.scores["asked"].tolist() == [len(text) + row["level"] for text, row in own]
        assert point.scores["found"].tolist() == [text.count(row["pattern"]) for text, row in own]
        assert point.scores["long"].tolist() == [-abs(len(text) - 20) for text, _ in own]
    (told,) = [note for note in run.header["told"] if "`never`" in note]
    assert told.startswith("reward `never` gives every response of sft the score 0") and "columns" in told
