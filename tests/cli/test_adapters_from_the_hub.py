"""Adapters by Hub id: the weights of their base stay on the Hub."""

import json

from command import ENVIRONMENT, prepared_run
from stand_in_hub import stand_in_hub
from tiny_adapters import edit_settings, save_adapter
from transformers import AutoModelForCausalLM


def test_only_the_config_of_the_base_is_fetched(tiny):
    place = tiny / "models/org"
    # In shards: the index is fetched with the config, the shards are not.
    AutoModelForCausalLM.from_pretrained(tiny / "sft").save_pretrained(place / "sft", max_shard_size="100KB")
    for seed, name in enumerate(("one", "two")):
        edit_settings(save_adapter(tiny / "sft", place / name, seed), base_model_name_or_path="org/sft")
    with stand_in_hub(tiny / "models") as hub:
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tiny / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        args = ("merge", "--base", "org/sft", "--policy", "org/one", "--policy", "org/two", "--out")
        for out, offline in (("out", "0"), ("again", "1")):
            done = prepared_run((*args, out), tiny, ENVIRONMENT | places | {"HF_HUB_OFFLINE": offline})
            assert done.returncode == 0, done
        fetched = [path for _, path in hub.asked if path.endswith(".safetensors")]
    assert fetched and all("adapter_model" in path for path in fetched)
    outputs = [tiny / out / "adapter_model.safetensors" for out in ("out", "again")]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert json.loads((tiny / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "org/sft"
