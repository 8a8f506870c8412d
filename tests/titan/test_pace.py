"""Which rank keeps the others waiting, and for how long: two real ranks, of which one has a slow loader."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, time, torch, torch.distributed as dist
import stackgrow.titan
from stackgrow.titan.pace import Pace
dist.init_process_group("gloo")
rank, pace = dist.get_rank(), Pace()
for step in range(4):
    dist.barrier()
    pace.begin()
    time.sleep(0.05 + 0.2 * rank)  # waits for its batch
    pace.end()
    time.sleep(0.1)  # the pass: no rank's own
    pace.begin()
waits = pace.compare(data_seconds=4 * (0.05 + 0.2 * rank), steps=4, device=torch.device("cpu"))
assert abs(waits.data - 0.25) < 1e-5, waits
assert 0.15 < waits.lag < 0.3, waits
assert waits.slowest_rank == 1, waits
assert pace.compare(0.0, 1, torch.device("cpu")).lag == 0, "counted anew"
dist.destroy_process_group()
"""


def test_the_rank_that_keeps_the_others_waiting_is_named(tmp_path: Path) -> None:
    script = tmp_path / "pace.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run(
        launch,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
