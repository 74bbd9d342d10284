"""Where base and policies wait for the next merge: the choice, with simulated memory."""

from types import SimpleNamespace

import torch
from exact import BFLOAT16
from hostile import make_family

from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines import memory_levels
from rewarded_lines.engines.memory_levels import Sizes, choose_level, place_for, stored_bytes
from rewarded_lines.merger.open_inputs import plan_merge

GB = 10**9
# 3 billion parameters in bfloat16, two policies; and 7 billion.
SMALL = Sizes(18 * GB, 18 * GB, 2 * GB, 11 * GB)
LARGE = Sizes(41 * GB, 41 * GB, 3 * GB, 19 * GB)


CHOICES = [
    ("auto", SMALL, 80, 128, "gpu", "stay on the GPU, beside the engine (20.0 GB of 61.0 GB)"),
    ("auto", LARGE, 84, 128, "gpu", "(44.0 GB of 56.6 GB)"),
    ("auto", LARGE, 48, 256, "host", "no room on the GPU, beside the engine (44.0 GB needed, 24.2 GB there); base"),
    ("auto", LARGE, 48, 64, "disk", "no room in the host's memory (41.0 GB needed, 19.2 GB there); base"),
    ("auto", SMALL, 14, 999, "disk", "no room to merge on the GPU (2.0 GB needed, 1.6 GB there)"),
    ("host", SMALL, 80, 128, "host", "stay in the host's memory (18.0 GB of 38.4 GB)"),
    ("disk", SMALL, 80, 128, "disk", "read from disk for every merge"),
    ("gpu", SMALL, 0, 128, "host", "there is no GPU; base and policies stay in the host's memory"),
    ("gpu", SMALL, 24, 10, "disk", "(20.0 GB needed, 10.6 GB there)"),
    ("host", Sizes(2 * GB, 2 * GB), 0, 8, "host", "(2.0 GB of 2.4 GB)"),
    ("auto", Sizes(2 * GB, 2 * GB), 0, 99, "disk", "read from disk for every merge"),
]


def test_the_level_that_has_room():
    for asked, sizes, gpu, host, level, said in CHOICES:
        place = choose_level(asked, sizes, gpu * GB, host * GB)
        assert place.level == level and said in place.why
        assert place.beside == {"gpu": sizes.inputs + sizes.working, "host": sizes.working, "disk": 0}[level]


def test_engines_of_one_machine_share_its_memory():
    # 0.3 × 512 GB for eight engines, and 0.3 × 2,048 GB.
    for host, level, said in ((512, "disk", "(41.0 GB needed, 19.2 GB there)"), (2048, "host", "(41.0 GB of 76.8 GB)")):
        place = choose_level("auto", LARGE, 48 * GB, host * GB, 8)
        assert place.level == level and f"in the host's memory, as one of 8 engines {said}" in place.why


def test_a_cards_memory_decides(tmp_path, monkeypatch):
    family = make_family(tmp_path, (BFLOAT16,) * 3, gentle=True)
    plan = plan_merge(str(family.base), {name: str(path) for name, path in family.policies.items()})
    folded = [
        place_for(SimpleNamespace(sources=[object()]), EngineSettings(resident=asked)) for asked in ("auto", "gpu")
    ]
    assert [place.why for place in folded] == ["", "base and adapters are read from disk for every merge, and folded"]
    free, needed = 80 * GB, stored_bytes(plan)
    assert needed == sum(info.bytes for source in plan.sources for info in source.tensors.values())
    assert [place_for(plan, EngineSettings(resident=asked)).level for asked in ("gpu", "auto")] == ["host", "disk"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (free, 80 * GB))
    for unused in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, unused, lambda device: 0)
    assert place_for(plan, EngineSettings()).level == "disk", "a vLLM that was built for CPUs"
    monkeypatch.setattr("rewarded_lines.engines.vllm_process.installed", lambda package: "0.32.0")
    place = place_for(plan, EngineSettings())
    assert place.level == "gpu" and place.beside > needed
    # The user's own share of the card leaves too little.
    assert place_for(plan, EngineSettings(gpu_memory_utilization=0.9)).level == "disk"
    free = memory_levels._CACHE
    assert place_for(plan, EngineSettings()).level == "disk"
