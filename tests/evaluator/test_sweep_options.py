"""The options that sweep, search and score share, in Python and on the command line."""

import inspect
from dataclasses import fields

import pytest

from rewarded_lines import score, search, sweep
from rewarded_lines.cli.score_command import score as typed_score
from rewarded_lines.cli.search_command import search as typed_search
from rewarded_lines.cli.sweep_command import sweep as typed_sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.sweep_options import SweepOptions, takes_sweep_options


@pytest.mark.parametrize(
    ("verb", "command"),
    [(sweep, typed_sweep), (search, typed_search), (score, typed_score)],
    ids=["sweep", "search", "score"],
)
def test_every_option_is_one_of_the_verb_and_of_its_command(verb, command):
    ours, typed = inspect.signature(verb).parameters, inspect.signature(command).parameters
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
