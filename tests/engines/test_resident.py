"""Base and policies in memory: every level gives the bits that `merge` writes; moves down; several workers."""

import gc
import json
import logging
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import BFLOAT16, FLOAT32
from hostile import SHAPES, load_codes, make_family

from rewarded_lines import merge
from rewarded_lines.engines import resident, worker_shares
from rewarded_lines.engines.base import base_spec
from rewarded_lines.engines.memory_levels import LEVELS
from rewarded_lines.engines.resident import Resident
from rewarded_lines.engines.worker_shares import Share
from rewarded_lines.errors import UserError
from rewarded_lines.kernels import blocks, thresholds_and_masks
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec

SPECS = [
    MergeSpec((0.37, 0.63), 0.4, 1.1),
    MergeSpec((0.3, 0.7), 0.4, 1.1, "ties", {"density": 0.5}).complete(2),
    MergeSpec((0.3, 0.7), 0.4, 1.1, "dare", {"density": 0.4, "seed": 1}).complete(2),
    MergeSpec((0.3, 0.7), 0.4, 1.1, "della", {"density": 0.6, "window": 0.4}).complete(2),
    MergeSpec((0.3, 0.7), 1.0, 0.0, "slerp").complete(2),
    MergeSpec((0.0, 1.0), 1.0, 0.0),
]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {
        kind: make_family(folder / kind, formats, 7, gentle=True)
        for kind, formats in {"alike": (BFLOAT16,) * 3, "mixed": (FLOAT32, BFLOAT16, BFLOAT16)}.items()
    }


@pytest.fixture
def plan(request, families, monkeypatch):
    """Return a plan whose tensors have several blocks and chunks; a parameter names its family."""
    for module in (blocks, thresholds_and_masks, worker_shares):
        monkeypatch.setattr(module, "BLOCK", 256)
    monkeypatch.setattr(resident, "CHUNK", 512)
    family = families[getattr(request, "param", "alike")]
    return plan_merge(str(family.base), {name: str(path) for name, path in family.policies.items()})


def bits(tensors):
    return {name: tensor.cpu().clone() for name, tensor in tensors}


def check(found, plan, spec):
    expected = bits(plan.tensors(spec))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


class Runtime:
    """Stands in for CUDA's runtime, and counts what it has locked."""

    def __init__(self):
        self.locked = set()

    def cudaHostRegister(self, place, size, flags):
        assert place % 4096 == 0 and place not in self.locked and size > 0
        self.locked.add(place)
        return 0

    def cudaHostUnregister(self, place):
        self.locked.remove(place)


class Stream:
    def __init__(self, device=None):
        self.waited = 0

    def record_event(self):
        return object()

    def wait_event(self, event):
        self.waited += 1

    def synchronize(self):
        pass


@pytest.fixture
def card(monkeypatch):
    """Let the host's level go through pinned memory and streams, with the CPU as the device."""
    runtime, main = Runtime(), Stream()
    monkeypatch.setattr(Resident, "_on_device", property(lambda self: self.level != "disk"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda place: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda row, stream: None)
    return SimpleNamespace(runtime=runtime, main=main)


FAMILIES = pytest.mark.parametrize("plan", ["alike", "mixed"], indirect=True)


@pytest.mark.parametrize(
    ("plan", "level"),
    [
        *(("alike", level) for level in LEVELS),
        ("mixed", "gpu"),
        *(pytest.param("mixed", level, marks=pytest.mark.slow) for level in LEVELS if level != "gpu"),
    ],
    indirect=["plan"],
)
def test_every_level_makes_the_same_bits(level, plan):
    held = Resident(plan, level)
    for spec in [*SPECS, base_spec(plan), SPECS[0]]:
        check(bits(held.tensors(spec)), plan, spec)
    assert held.level == level


def test_pinned_memory_and_copies_ahead(plan, card):
    held = Resident(plan, "host")
    for spec in SPECS:
        check(bits(held.tensors(spec)), plan, spec)
    assert card.runtime.locked and card.main.waited >= len(SPECS) * len(plan.names)
    held.close()
    assert not card.runtime.locked


def test_the_bits_that_merge_writes(families, tmp_path):
    family = families["alike"]
    policies = {name: str(path) for name, path in family.policies.items()}
    (result,) = merge(str(family.base), policies, (0.37, 0.63), out=tmp_path / "out", alpha=0.4, beta=1.1)
    codes, _ = load_codes(result.out)
    found = bits(Resident(plan_merge(str(family.base), policies), "gpu").tensors(SPECS[0]))
    assert all(np.array_equal(found[name].view(torch.uint16).numpy(), codes[name]) for name in SHAPES)


@pytest.mark.gpu
@FAMILIES
@pytest.mark.parametrize("level", ["gpu", "host", "disk"])
def test_on_a_gpu(level, plan):
    held = Resident(plan, level, "cuda")
    for spec in [*SPECS, base_spec(plan), SPECS[0]]:
        check(bits(held.tensors(spec)), plan, spec)
    held.close()


# ---- memory that runs out ---------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_moves_down_while_loading(plan, card, monkeypatch, caplog):
    def moved(self, *args, own=Resident._moved):
        return full() if self.level == "gpu" else own(self, *args)

    monkeypatch.setattr(Resident, "_moved", moved)
    held = Resident(plan, "gpu")
    check(bits(held.tensors(SPECS[0])), plan, SPECS[0])
    assert held.level == "host" and card.runtime.locked
    assert "gpu had no room (CUDA out of memory. Tried to allocate 2 GiB); now host" in caplog.text


@pytest.mark.gpu
def test_a_gpu_without_room(plan):
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        held = Resident(plan, "gpu", "cuda")
        torch.cuda.empty_cache()
        check(bits(held.tensors(SPECS[0])), plan, SPECS[0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert held.level == "disk"


def test_moves_down_in_the_midst_of_a_swap(plan, card, monkeypatch, caplog):
    held = Resident(plan, "gpu")
    list(held.tensors(SPECS[0]))
    calls = []

    def merged(*args, own=resident.merge_values, **kwargs):
        calls.append(args)
        return full() if len(calls) in (5, 9) else own(*args, **kwargs)

    monkeypatch.setattr(resident, "merge_values", merged)
    check(bits(held.tensors(SPECS[0])), plan, SPECS[0])
    assert held.level == "disk" and not card.runtime.locked
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_host_without_memory(plan, monkeypatch):
    def none(*args):
        raise MemoryError

    monkeypatch.setattr(Resident, "_stored", none)
    held = Resident(plan, "host")
    check(bits(held.tensors(SPECS[1])), plan, SPECS[1])
    assert held.level == "disk"


def test_closing_frees_what_a_circle_holds(plan):
    held = Resident(plan, "gpu")
    held.load()
    kept = [weakref.ref(row) for rows in held._rows.values() for row in rows]
    gc.disable()
    try:
        circle = [held._rows]
        circle.append(circle)
        del circle
        held.close()
        assert kept and all(row() is None for row in kept)
    finally:
        gc.enable()


# ---- several workers --------------------------------------------------------------------------------------------


class Group:
    """Stands in for torch.distributed, for threads."""

    def __init__(self, size):
        self.barrier, self.parts, self.size = threading.Barrier(size), {}, size

    def exchange(self, rank, part):
        self.barrier.wait(20)
        self.parts[rank] = part.clone()
        self.barrier.wait(20)
        parts = [self.parts[rank] for rank in range(self.size)]
        self.barrier.wait(20)
        return parts


def test_each_worker_merges_its_part(plan, monkeypatch):
    group, ranks = Group(3), {}

    def gather(whole, part, group):
        whole.copy_(torch.cat(group.exchange(ranks[threading.get_ident()], part)))

    def reduce(total, op=None, group=None):
        parts = torch.stack(group.exchange(ranks[threading.get_ident()], total))
        total.copy_(parts.sum(0) if op is None else parts.amax(0))

    for name in ("all_gather_into_tensor", "all_gather_single"):
        monkeypatch.setattr(torch.distributed, name, gather, raising=False)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    found, held, moves = {}, {}, []

    def work(rank):
        ranks[threading.get_ident()] = rank
        held[rank] = Resident(plan, "gpu", share=Share(group, rank, 3, group))
        if rank == 1:
            # One of them has no room at first: all load again.
            held[rank]._try_largest = lambda spec: (held[rank].__dict__.pop("_try_largest"), full())
        found[rank] = [bits(held[rank].tensors(spec)) for spec in SPECS]

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(3)]
    monkeypatch.setattr(Resident, "_move_down", lambda self, reason: (moves.append(reason), self.close()))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(moves) == 3 and moves.count("no room at another worker") == 2
    for rank in range(3):
        for made, spec in zip(found[rank], SPECS, strict=True):
            check(made, plan, spec)
    elements = sum(info.elements for info in plan.outputs())
    parts = [sum(row[0].numel() for row in one._rows.values()) for one in held.values()]
    assert sum(parts) == elements and max(parts) < 0.8 * elements


@pytest.mark.slow
def test_no_worker_waits_for_one_that_fails(tmp_path):
    """Two processes of torch.distributed: where one runs out of memory or fails, the other moves or fails, too."""
    make_family(tmp_path, (BFLOAT16,) * 3, 7, gentle=True)
    script = str(Path(__file__).parent / "two_workers.py")
    workers = [subprocess.Popen([sys.executable, script, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [
        [["disk", "same bits"], ["gpu", "left"]],
        [["disk", "same bits"], ["gpu", "no place for this tensor"]],
    ]


# ---- values that are not finite ---------------------------------------------------------------------------------


def test_what_is_not_finite_is_refused_alike(tmp_path):
    family = make_family(tmp_path, (FLOAT32,) * 3, 3, gentle=True)
    name = "model.layers.1.mlp.up_proj.weight"
    path = family.policies["p2"] / "model.safetensors"
    content = bytearray(path.read_bytes())
    codes = family.codes[2][name].tobytes()
    place = content.index(codes)
    content[place : place + 4] = np.float32(np.inf).tobytes()
    path.write_bytes(content)
    plan = plan_merge(str(family.base), {name: str(path) for name, path in family.policies.items()})
    for level, spec in product(LEVELS, (SPECS[0], SPECS[1], MergeSpec((1.0, 0.0)))):
        with pytest.raises(UserError, match=r"up_proj.weight: 1 values are not finite in policy `p2`"):
            list(Resident(plan, level).tensors(spec))
