"""Several vLLM engines in one process: what one leaves to the others at its end, and how much each takes."""

import sys
from types import SimpleNamespace

from transformers import LlamaConfig, MixtralConfig

from rewarded_lines.engines import vllm_process
from rewarded_lines.engines.vllm_memory import few_at_once, few_scored_at_once
from rewarded_lines.engines.vllm_process import end_vllm, enlist, take_turn
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.model_sizes import engine_size


class Vllm:
    """vLLM's state of a process: groups that the end of any engine destroys, and one workspace for all."""

    def __init__(self, monkeypatch):
        self.core = SimpleNamespace(cleanup_dist_env_and_memory=self.destroy)
        self.workspace = SimpleNamespace(_manager=None)
        self.groups = False
        monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", self.core)
        monkeypatch.setitem(sys.modules, "vllm.v1.worker.workspace", self.workspace)
        monkeypatch.setattr(vllm_process, "_living", set())

    def destroy(self):
        self.groups = False

    def start(self, name):
        self.groups, self.workspace._manager = True, name
        return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.end)))

    def end(self):
        self.workspace._manager = None
        self.core.cleanup_dist_env_and_memory()


def test_the_end_of_an_engine_leaves_the_others_whole(monkeypatch):
    vllm = Vllm(monkeypatch)
    engines = {}
    for name in ("policy", "first", "second"):
        engines[name] = vllm.start(name)
        enlist(engines[name])
    for ended in ("first", "policy"):
        end_vllm(engines.pop(ended))
        assert vllm.groups, "torch.distributed of the others"
        for name, llm in engines.items():
            take_turn(llm)
            assert vllm.workspace._manager == name
    end_vllm(engines["second"])
    assert not vllm.groups
    # And again, with the next ones.
    again = vllm.start("again")
    enlist(again)
    end_vllm(again)
    assert not vllm.groups


def test_a_start_that_failed_beside_others_leaves_them_whole(monkeypatch):
    vllm = Vllm(monkeypatch)
    enlist(vllm.start("policy"))
    vllm.start("reward").llm_engine.engine_core.shutdown()
    assert vllm.groups


def test_a_small_engines_working_memory_is_that_of_its_batches():
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, vocab_size=128256)
    assert few_at_once(100) == {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
    assert few_at_once(8192) == {"max_num_seqs": 256, "max_num_batched_tokens": 8192}
    activations = 8192 * (3 * 14336 + 6 * 4096) * 2

    def work(config, longest, **source):
        size = config.hidden_size // config.num_attention_heads
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * size * longest * 2
        return engine_size(config, RewardSpec(dtype="bfloat16", **source), 1, longest, "cpu")[0] - 1 - cache

    assert work(config, 8192, model="m") == (1 << 30) + activations
    assert work(config, 8192, judge="m", token=["A"], template="chat") == (1 << 30) + activations + 256 * 128256 * 20
    experts = LlamaConfig(hidden_size=4096, intermediate_size=256, vocab_size=9)
    experts.moe_intermediate_size, experts.num_experts_per_tok = 1536, 8
    assert work(experts, 16384, model="m") == (1 << 30) + 16384 * (3 * 8 * 1536 + 6 * 4096) * 2
    # Mixtral names no size of its own for experts.
    mixtral = MixtralConfig(hidden_size=4096, intermediate_size=14336, num_experts_per_tok=2)
    assert work(mixtral, 8192, model="m") == (1 << 30) + 8192 * (3 * 2 * 14336 + 6 * 4096) * 2
    # However small the batches.
    assert work(experts, 8, model="m") == 2 << 30


def test_a_batch_of_long_texts_to_score_has_few_tokens():
    for longest, towers, args, tokens in (
        (2048, False, {}, None),
        (2049, False, {}, 2048),
        (99999, False, {"max_num_seqs": 3000}, 3000),
        (4096, True, {}, None),
        (99999, True, {}, 4096),
    ):
        assert few_scored_at_once(longest, towers, args).get("max_num_batched_tokens") == tokens
