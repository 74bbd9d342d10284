"""PPO's settings by their usual names, and what they mean to TRL's GRPOTrainer."""

from __future__ import annotations

import copy
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from trl import GRPOConfig

from rewarded_lines.errors import Problem, UserError, fail

# Keys of `GRPOConfig` that another key or this trainer decides.
_DECIDED = {
    "beta": "kl_coef", "epsilon": "cliprange", "num_iterations": "num_ppo_epochs",
    "max_completion_length": "response_length", "max_steps": "total_episodes",
    "steps_per_generation": "num_mini_batches", "generation_batch_size": "effective_batch_size",
    "loss_type": "", "scale_rewards": "", "multi_objective_aggregation": "", "reward_weights": "`rewards`",
    "use_bias_correction_kl": "",
}  # fmt: skip
_OWN = "the loss is PPO's"
# The recipe sets these after the configuration has been checked.
_LATER = ("output_dir", "model_init_kwargs", "chat_template_kwargs", "reward_weights")


def _key(help: str, default: Any) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class SingleResponseConfig(GRPOConfig):  # type: ignore[misc]
    """TRL's `GRPOConfig`, also for one response to each prompt: a critic needs no group to compare it with."""

    def __post_init__(self) -> None:
        """Check the settings as TRL does."""
        wanted = self.num_generations
        if wanted == 1:
            # TRL wants two or more that divide the batch. The episodes of one process are such a number, from two on.
            self.num_generations = max(
                2, self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)
            )
            self.num_generations_eval = self.num_generations_eval or 1
        super().__post_init__()
        self.num_generations = wanted


@dataclass
class PPOConfig(SingleResponseConfig):
    """Settings of PPO: those of TRL's earlier `PPOConfig`, and those of `GRPOConfig` that PPO has a use for.

    An update samples `per_device_train_batch_size × gradient_accumulation_steps` episodes in each process and trains on
    them `num_ppo_epochs` times in `num_mini_batches`, each with one step of the optimizer. Where TRL counts steps
    (`logging_steps`, `save_steps`, `warmup_steps`, `ref_model_sync_steps`), here updates are counted.
    """

    REFUSED: ClassVar[frozenset[str]]

    learning_rate: float = _key("initial learning rate", 3e-6)
    temperature: float = _key("sampling temperature", 0.7)
    num_generations: int = _key("responses to each prompt of an update", 1)
    disable_dropout: bool = _key("train without dropout", True)
    total_episodes: int | None = _key("responses to train on, by default `num_train_epochs` for each prompt", None)
    response_length: int = _key("longest response, in tokens", 53)
    local_rollout_forward_batch_size: int = _key("responses that a process samples and reads at once", 64)
    num_ppo_epochs: int = _key("passes over the episodes of an update", 4)
    num_mini_batches: int = _key("parts of these episodes, each with one step of the optimizer", 1)
    missing_eos_penalty: float | None = _key("subtracted from the reward of a response that does not end", None)
    whiten_rewards: bool = _key("divide the rewards of tokens by their standard deviation", False)
    kl_coef: float = _key("weight of the KL to the SFT model in the reward; see `sync_ref_model`", 0.05)
    kl_estimator: Literal["k1", "k3"] = _key("how the KL is estimated; k3 varies less", "k1")
    target_kl: float | None = _key("adapt `kl_coef` until the KL to the SFT model, in nats, is this", None)
    kl_horizon: int = _key("pace of that adaptation, in episodes", 10_000)
    cliprange: float = _key("clip range of the policy's probability ratio", 0.2)
    cliprange_value: float = _key("clip range of the critic's values", 0.2)
    vf_coef: float = _key("weight of the critic's loss", 0.1)
    gamma: float = _key("discount factor", 1.0)
    lam: float = _key("λ of generalized advantage estimation", 0.95)
    critic: Literal["separate", "shared"] = _key("a model of its own, or a value head on the policy", "separate")
    critic_model: str | None = _key(
        "start of a separate critic: a reward model with the policy's tokenizer, by default the SFT model", None
    )
    stop_token: Literal["eos"] | None = _key("no effect: responses end at every end token of the project", None)
    stop_token_id: int | None = _key("no effect, but refused if the project does not end responses there", None)
    num_sample_generations: int = _key("0: to print samples, set `log_completions: true`", 0)
    dataset_num_proc: int | None = _key("no effect", None)

    def __post_init__(self) -> None:
        """Refuse keys that have no meaning here, and batches that cannot be divided."""
        # The constructor of `GRPOConfig` fills keys in; `settings` needs what was given.
        self._given = {one.name: copy.copy(getattr(self, one.name)) for one in fields(self) if one.init}
        if problems := [*self._unused(), *self._wrong()]:
            raise UserError(problems)
        super().__post_init__()

    def _unused(self) -> list[Problem]:
        found = []
        for one in fields(self):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            if one.name in _DECIDED and getattr(self, one.name) != default:
                name = _DECIDED[one.name]
                remedy = f"set {name if name.startswith('`') else f'`{name}`'} instead" if name else "leave it out"
                found.append(Problem("not a key of PPO", where=one.name, expected="" if name else _OWN, remedy=remedy))
        return found

    def _wrong(self) -> list[Problem]:
        found = []
        own, parts = self._own_batch, self.num_mini_batches
        if parts < 1 or own % parts:
            what = "the episodes of a process cannot be divided into mini-batches"
            found.append(Problem(what, where="num_mini_batches", expected=f"a divisor of {own}", got=str(parts)))
        if self.num_sample_generations:
            what, remedy = "samples are printed by another key", "set it to 0, and `log_completions: true`"
            found.append(Problem(what, where="num_sample_generations", remedy=remedy))
        if self.critic == "shared" and self.critic_model:
            what = "a value head on the policy has no model of its own"
            found.append(Problem(what, where="critic_model", remedy="leave it out, or set `critic: separate`"))
        positive = ["num_ppo_epochs", "response_length", "local_rollout_forward_batch_size", "kl_horizon"]
        positive += [name for name in ("target_kl", "total_episodes") if getattr(self, name) is not None]
        found += [
            Problem("not a positive number", where=name, got=str(getattr(self, name)))
            for name in positive
            if not getattr(self, name) > 0
        ]
        found += [
            Problem("unknown value", where=name, expected=f"one of {', '.join(known)}", got=str(getattr(self, name)))
            for name, known in (("kl_estimator", ("k1", "k3")), ("critic", ("separate", "shared")))
            if getattr(self, name) not in known
        ]
        if own == 1:
            what, remedy = "an update of one episode", "raise `per_device_train_batch_size` or `effective_batch_size`"
            found.append(
                Problem(what, where="per_device_train_batch_size", expected="2 or more", got="1", remedy=remedy)
            )
        return found

    def _check_deepspeed(self) -> None:
        """Refuse what the critic cannot do, which DeepSpeed does not know."""
        plugin = self.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3 and self.critic == "separate":
            raise fail(
                "ZeRO-3 shards one model only, the policy",
                where="critic",
                got="separate",
                remedy="set `critic: shared`, a value head on the policy, or use FSDP2 or ZeRO-2",
            )
        if plugin is not None and self.fp16:
            what = "DeepSpeed scales the loss for fp16, and the critic would take the scaled gradients"
            raise fail(what, where="fp16", remedy="set `bf16: true`, or use FSDP2 or DDP")

    @property
    def _own_batch(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def steps_per_update(self) -> int:
        """Steps of the optimizer between two rounds of sampling."""
        return self.num_ppo_epochs * self.num_mini_batches

    def settings(self, prompts: int) -> SingleResponseConfig:
        """Return the settings for GRPOTrainer to train on so many prompts.

        Raises:
            UserError: DeepSpeed cannot take them, or there is nothing to train on.
        """
        self._check_deepspeed()
        episodes = self._own_batch * self.world_size
        wanted = int(self.num_train_epochs * prompts) if self.total_episodes is None else self.total_episodes
        if wanted < 1:
            raise fail("no episode to train on", where="num_train_epochs", got=str(self.num_train_epochs))
        updates, mini = math.ceil(wanted / episodes), self._own_batch // self.num_mini_batches
        micro = math.gcd(self.per_device_train_batch_size, mini)
        names = {one.name for one in fields(SingleResponseConfig) if one.init}
        given = {name: value for name, value in self._given.items() if name in names}
        given |= {name: getattr(self, name) for name in _LATER}
        steps = {name: self._steps(given[name], updates) for name in ("logging_steps", "save_steps", "eval_steps")}
        if given["warmup_steps"] >= 1:
            steps["warmup_steps"] = given["warmup_steps"] * self.steps_per_update
        steps["ref_model_sync_steps"] = given["ref_model_sync_steps"] * self.steps_per_update
        return SingleResponseConfig(
            **given
            | steps
            | {
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": mini // micro,
                "steps_per_generation": self._own_batch // micro,
                "num_iterations": self.num_ppo_epochs,
                "max_steps": updates * self.steps_per_update,
                "max_completion_length": self.response_length,
                "epsilon": self.cliprange,
                # Any number but 0 makes TRL keep the reference; the trainer uses it for the reward, not for the loss.
                "beta": 1.0,
                "scale_rewards": "none",
            }
        )

    def _steps(self, value: float | None, updates: int) -> float | None:
        """Return a number of updates, or a share of all, as a number of optimizer steps."""
        if value is None:
            return None
        return (math.ceil(value * updates) if value < 1 else int(value)) * self.steps_per_update


# `--help` leaves these out. `max_steps` it shows, as for every trainer.
PPOConfig.REFUSED = frozenset(_DECIDED) - {"max_steps"}
