"""How much memory reward models get beside an engine: which of them stay between uses, and which take turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rewarded_lines.config_values import parse_memory
from rewarded_lines.engines.vllm_memory import WORKING_MEMORY
from rewarded_lines.errors import fail
from rewarded_lines.processes import available_memory
from rewarded_lines.rewards.model_sizes import in_gib, whole_memory
from rewarded_lines.rewards.reward import Reward

# Of a CPU's available memory; its models need few activations beside the weights.
_SHARE_OF_MEMORY = 0.8
# Of a GPU, if no budget is given and the reward models can do with it.
_SHARE_OF_GPU = 0.5


@dataclass(frozen=True)
class RewardMemory:
    """What reward models may take of a GPU together.

    Attributes:
        budget: the user's, such as "24GiB" or "30%".
        decided: by device, the bytes that `spare_memory` has planned for them beside an engine.
    """

    budget: str | None = None
    decided: dict[str, int] = field(default_factory=dict)

    def limit(self, device: str) -> int | None:
        """Return the bytes of a device; None without a limit."""
        if device == "cpu" or (self.budget is None and device not in self.decided):
            return None
        return self.decided.get(device) or _bytes_of(str(self.budget), whole_memory(device))


# Of each model in memory, or that comes back, one reward that has it, and the names of all that share it.
HeldModels = Mapping[Reward, str]


def held_models(rewards: Iterable[Reward]) -> dict[str, dict[Reward, str]]:
    """Return the models of rewards, by their devices."""
    groups: dict[int, list[Reward]] = defaultdict(list)
    for reward in rewards:
        if reward.size:
            groups[id(reward.shared)].append(reward)
    models: dict[str, dict[Reward, str]] = defaultdict(dict)
    for some in groups.values():
        models[some[0].device][some[0]] = ", ".join(one.name for one in some)
    return models


def those_that_stay(sizes: Sequence[int], room: int) -> set[int]:
    """Return the places of the models that stay between uses, where all together may take `room` bytes.

    All of them if they fit. Otherwise the smallest ones, so many that the largest fits beside them: it takes turns with
    the rest.
    """
    if sum(sizes) <= room:
        return {*range(len(sizes))}
    order = sorted(range(len(sizes)), key=lambda at: sizes[at])
    used, stay = sizes[order[-1]], set()
    for at in order:
        used += sizes[at]
        if used > room:
            break
        stay.add(at)
    return stay


def staying(models: Sequence[Reward], memory: RewardMemory) -> list[Reward]:
    """Return those of one device's models that stay between uses, as its free memory and the limit allow."""
    device = models[0].device
    room = available_memory(device) - WORKING_MEMORY
    if device == "cpu":
        room = int(_SHARE_OF_MEMORY * available_memory(device))
    room += sum(one.size for one in models if one.loaded)
    if (limit := memory.limit(device)) is not None:
        room = min(room, limit - WORKING_MEMORY)
    stay = those_that_stay([one.size for one in models], room)
    return [one for at, one in enumerate(models) if at in stay]


def spare_memory(
    rewards: Iterable[Reward],
    memory: RewardMemory,
    offload: str = "auto",
    devices: int = 1,
    tell: Callable[[str], None] = lambda fact: None,
) -> int:
    """Return the bytes of a GPU that an engine must leave free for reward models, beside what they hold now.

    They get the budget, or else half of the GPU, or what the largest needs if that is more. Those that do not stay
    leave the GPU before the engine starts. What is decided is kept in `memory`, and `tell` gets a sentence on who
    stays. The engine has so many `devices`, from the first GPU on; for `offload` see `Scorer`.

    Raises:
        UserError: the budget is too small for the models that must be in memory at once.
    """
    gpus = {f"cuda:{at}" for at in range(devices)}
    groups = held_models(rewards).items()
    return max(
        (_spare(device, models, memory, offload, tell) for device, models in groups if device in gpus), default=0
    )


def _spare(device: str, models: HeldModels, memory: RewardMemory, offload: str, tell: Callable[[str], None]) -> int:
    sizes = [one.size for one in models]
    loaded = sum(one.size for one in models if one.loaded)
    places, peak = shared_out(sizes, available_memory(device) + loaded, whole_memory(device), memory.budget, offload)
    stay = [one for at, one in enumerate(models) if at in places]
    memory.decided[device] = peak + WORKING_MEMORY
    for one in models:
        if one not in stay:
            one.rest()
    tell(f"{device}: {in_gib(peak + WORKING_MEMORY)} for reward models; {_words(models, stay)}")
    return max(peak + WORKING_MEMORY - sum(one.size for one in stay if one.loaded), 0)


def shared_out(
    sizes: Sequence[int], free: int, card: int, budget: str | None, offload: str = "auto"
) -> tuple[set[int], int]:
    """Return the places of the models that stay beside an engine, and the bytes of the weights there at once.

    Of the `card`, a GPU, so many bytes are `free` without them. See `spare_memory` for the rest.
    """
    half = int(_SHARE_OF_GPU * free)
    whole = _bytes_of(budget, card) if budget is not None else max(half, max(sizes) + WORKING_MEMORY)
    if offload == "auto":
        stay = those_that_stay(sizes, whole - WORKING_MEMORY)
    else:
        stay = {*range(len(sizes))} if offload == "never" else set()
    peak = sum(sizes[at] for at in stay) + max((one for at, one in enumerate(sizes) if at not in stay), default=0)
    if budget is not None and peak + WORKING_MEMORY > whole:
        raise fail(
            "the memory of reward models is too small for those that must be there at once",
            where="--reward-memory",
            expected=f"{in_gib(peak)} for weights and {in_gib(WORKING_MEMORY)} to work",
            got=f"{budget}, {in_gib(whole)}",
            remedy="raise it, declare `dtype: bfloat16`, or `device: cpu` for a reward",
        )
    return stay, peak


def _words(models: HeldModels, stay: Sequence[Reward]) -> str:
    named = {one: f"{names} ({in_gib(one.size)})" for one, names in models.items()}
    held = ", ".join(name for one, name in named.items() if one in stay)
    turns = ", ".join(name for one, name in named.items() if one not in stay)
    return "; ".join([*([f"in memory: {held}"] if held else []), *([f"taking turns: {turns}"] if turns else [])])


def turns_told(models: HeldModels, stay: Sequence[Reward]) -> str:
    """Return a sentence on who stays in memory and who takes turns."""
    device = next(iter(models)).device
    return f"reward models do not fit into the memory of {device} together; {_words(models, stay)}"


def _bytes_of(budget: str, card: int) -> int:
    """Return a budget in bytes; a share is one of the whole GPU."""
    amount = parse_memory(budget)
    return int(amount * card) if budget.rstrip().endswith("%") else int(amount)
