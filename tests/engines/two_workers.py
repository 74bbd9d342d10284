"""One of two workers that merge together: `python two_workers.py RANK FOLDER`, started twice by a test.

It writes what became of two swaps to `FOLDER/RANK.json`. In the midst of the first, worker 1 runs out of memory. In
the midst of the second, its engine fails, which takes the tensors.
"""

import json
import sys
from pathlib import Path

import torch

from rewarded_lines.engines import resident, worker_shares
from rewarded_lines.engines.worker_shares import Share
from rewarded_lines.kernels import blocks
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec

SPEC = MergeSpec((0.3, 0.7), 0.5, 1.0)


def run_out_of_memory():
    calls = []

    def merged(*args, own=resident.merge_values, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*args, **kwargs)

    resident.merge_values = merged


def swap(held, share, fails):
    """Take every tensor, as vLLM does; return their bits."""
    taken = {}
    with share.together():
        for name, tensor in held.tensors(SPEC):
            taken[name] = tensor.clone()
            if fails and len(taken) == 3:
                raise ValueError("no place for this tensor")
    return taken


def outcome(plan, share, rank, fault):
    held = resident.Resident(plan, "gpu", share=share)
    held.load()
    if rank == 1 and fault == "memory":
        run_out_of_memory()
    try:
        taken = swap(held, share, rank == 1 and fault == "engine")
        expected = dict(plan.tensors(SPEC))
        told = "same bits" if all(torch.equal(taken[name], one) for name, one in expected.items()) else "other bits"
    except KeyError:
        told = "left"
    except ValueError as error:
        told = str(error)
    return held.level, told


def main(rank, folder):
    # Each worker has a part of these small tensors.
    blocks.BLOCK = worker_shares.BLOCK = 256
    # There is no pinned memory without a GPU.
    resident.LEVELS = ("gpu", "disk")
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    share = Share(torch.distributed.group.WORLD, rank, 2, torch.distributed.group.WORLD)
    plan = plan_merge(str(folder / "base"), {name: str(folder / name) for name in ("p1", "p2")})
    (folder / f"{rank}.json").write_text(
        json.dumps([outcome(plan, share, rank, fault) for fault in ("memory", "engine")])
    )
    # Its threads end here: left running, they may abort the process as it exits.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
