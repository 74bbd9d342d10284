"""Which matrix a pair of factors changes: how PEFT nests parameters, and the order in which models declare them."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from rewarded_lines.checkpoints.adapter_config import AdapterConfig
from rewarded_lines.checkpoints.low_rank import outermost_first, paths_of, targets_of
from rewarded_lines.errors import UserError

EXPERTS = "model.layers.0.mlp.experts"
FUSED = [f"{EXPERTS}.base_layer", EXPERTS]


def targets(paths, **settings):
    found = targets_of(paths, AdapterConfig(content={}, **settings), "file")
    return {path: name if bare else None for path, (name, bare) in found.items()}


@pytest.mark.parametrize(
    "parameters",
    [
        ["gate_up_proj", "down_proj", "gate.weight"],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"],
        ["experts.down_proj", "gate_up_proj"],
    ],
)
def test_the_outermost_is_the_one_declared_last(parameters):
    found = targets(FUSED, target_parameters=parameters)
    assert found == {FUSED[0]: f"{EXPERTS}.gate_up_proj", FUSED[1]: f"{EXPERTS}.down_proj"}
    assert paths_of(dict.fromkeys(found.values(), True)) == {name: path for path, name in found.items()}


def test_modules_are_told_from_parameters_by_their_targets():
    paths = ["model.layers.0.mlp.gate", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    settings = {"target_parameters": ["gate.weight", "down_proj"]}
    found = targets(paths, **settings, target_modules=["q_proj", "mlp.down_proj"])
    assert found == {paths[0]: "model.layers.0.mlp.gate.weight", paths[1]: None, paths[2]: None}
    assert targets(paths, **settings, target_modules=r".*(q_proj|mlp\.down_proj)") == found
    assert targets(paths, target_modules=["gate", "q_proj", "down_proj"]) == dict.fromkeys(paths)
    # Too involved to be tried: it may take for ever.
    with pytest.raises(UserError, match="do not say which parameter"):
        targets(paths, **settings, target_modules=r"(a+)+q_proj")


@pytest.mark.parametrize(
    ("paths", "parameters"),
    [(FUSED, []), (FUSED, ["down_proj"]), (FUSED, ["one", "two"]), (FUSED[1:], ["gate_up_proj", "down_proj"])],
)
def test_what_is_not_sure_is_refused(paths, parameters):
    with pytest.raises(UserError, match="do not say which parameter"):
        targets(paths, target_parameters=parameters, target_modules=["q_proj"])


@pytest.mark.slow
def test_every_model_declares_its_fused_experts_in_the_order_that_is_assumed():
    models = Path(find_spec("transformers").origin).parent / "models"
    orders = set()
    for path in models.glob("*/modeling_*.py"):
        for text in re.split(r"^class ", path.read_text(), flags=re.MULTILINE):
            names = re.findall(r"self\.(\w+_proj) = nn\.Parameter", text)
            if len(names) > 1:
                orders.add(tuple(dict.fromkeys(names)))
    assert orders >= {("gate_up_proj", "down_proj"), ("up_proj", "down_proj")}
    assert all(outermost_first(names) == list(reversed(names)) for names in orders), orders
