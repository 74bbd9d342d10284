"""The options that sweep, search and score share, in Python and on the command line."""

import inspect
from dataclasses import fields

import pytest

from rewarded_lines import score, search, sweep
from rewarded_lines.cli import app
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.sweep_options import SweepOptions, takes_sweep_options

COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}


@pytest.mark.parametrize("verb", [sweep, search, score])
def test_every_option_is_one_of_the_verb_and_of_its_command(verb):
    ours, typed = (inspect.signature(one).parameters for one in (verb, COMMANDS[verb.__name__]))
    for option in fields(SweepOptions):
        if verb is score and option.name in ("ray", "workers"):
            assert option.name not in ours and option.name not in typed
        else:
            default = None if (verb, option.name) == (search, "engine") else option.default
            assert ours[option.name].default == typed[option.name].default == default


def test_options_are_taken_one_by_one_or_whole():
    @takes_sweep_options(without=("ray",))
    def verb(first, *, options, device="own"):
        return first, options, device

    assert verb(1, engine="hf", layers="x") == (1, SweepOptions(engine="hf", layers="x"), "own")
    whole = SweepOptions(engine="hf")
    assert verb(1, options=whole, offload="never") == (1, SweepOptions(engine="hf", offload="never"), "own")
    with pytest.raises(TypeError, match="unexpected keyword argument 'ray'"):
        verb(1, ray="local")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 2}, "workers need Ray"),
        ({"tensor_parallel": 0}, "not a number of devices"),
        ({"tensor_parallel": 2, "engine": "hf"}, "only vLLM spreads a model"),
        ({"offload": "sometimes"}, "unknown value `sometimes`"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(given, message):
    with pytest.raises(UserError, match=message):
        sweep("there is no such project", **given)
