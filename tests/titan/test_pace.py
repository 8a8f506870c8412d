"""Which rank keeps the others waiting, and for how long: two real ranks, of which one has a slow loader."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from warm import in_ranks

from stackgrow.titan.pace import Pace


def _waits_for_the_second(rank: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    pace = Pace()
    own_wait = 0.05 + 0.2 * rank
    for _ in range(4):
        dist.barrier()
        pace.begin()
        time.sleep(own_wait)  # for its batch
        pace.end()
        time.sleep(0.1)  # the pass: no rank's own
        pace.begin()
    waits = pace.compare(data_seconds=4 * own_wait, steps=4, device=torch.device("cpu"))
    assert abs(waits.data - 0.25) < 1e-5, waits
    assert 0.15 < waits.lag < 0.3, waits
    assert waits.slowest_rank == 1, waits
    assert pace.compare(0.0, 1, torch.device("cpu")).lag == 0, "counted anew"
    dist.destroy_process_group()


def test_the_rank_that_keeps_the_others_waiting_is_named(tmp_path: Path) -> None:
    in_ranks(_waits_for_the_second, 2, str(tmp_path / "store"))
