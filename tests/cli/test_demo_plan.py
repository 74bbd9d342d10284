"""What the demo prints as it begins and goes on: the plan, a line for each stage, the time left."""

import io

import pytest
from rich.console import Console

from rewarded_lines.cli.demo_command import _Display
from rewarded_lines.demo.demo_settings import DemoSettings
from rewarded_lines.demo.stages import PLAN, STAGES


@pytest.fixture
def shown():
    """A display that writes into a file, as where the output is piped, and what it wrote."""
    file = io.StringIO()
    return _Display(Console(file=file, width=100), DemoSettings("runs/demo"), "merge"), file


def test_the_plan_comes_first_then_a_line_for_each_stage_with_the_time_left(shown):
    display, file = shown
    with display.live:
        display.started("data")
        plan = file.getvalue()
        assert all(f"  {stage:<10}{PLAN[stage].short:5.0f} s  {PLAN[stage].about}" in plan for stage in STAGES)
        later = [sum(PLAN[one].short for one in STAGES[at + 1 :]) for at in range(len(STAGES))]
        display.finished("data", 30.0, reused=False)
        # A stage of seconds tells nothing about the machine.
        assert f"data         30.0 s  done, about {clock(later[0])} left\n" in file.getvalue()
        display.started("sft")
        pace = 2.0
        display.finished("sft", pace * (PLAN["data"].short + PLAN["sft"].short) - 30.0, reused=False)
        assert f"done, about {clock(pace * later[1])} left\n" in file.getvalue()
        display.started("reward")
        display.finished("reward", 500.0, reused=True)
        assert f"done by an earlier run, about {clock(pace * later[2])} left\n" in file.getvalue()
        display.finished("merge", 1.0, reused=False)
    assert file.getvalue().endswith("s  done\n") and "\x1b" not in file.getvalue()


def test_the_time_left_of_all_stages_follows_the_slowest_part(shown, monkeypatch):
    display, _ = shown
    display.started("policies")
    works = [display.part("ppo positive"), display.part("ppo detailed")]
    console = Console(width=80, file=io.StringIO())
    later = PLAN["sweep"].short + PLAN["report"].short + PLAN["merge"].short
    console.print(display._shown())
    assert f"all stages: about {clock(PLAN['policies'].short + later)} left" in console.file.getvalue()
    monkeypatch.setattr(works[0], "left", lambda: 20.0)
    monkeypatch.setattr(works[1], "left", lambda: 100.0)
    console.print(display._shown())
    assert f"all stages: about {clock(100 + later)} left" in console.file.getvalue()


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
