from pathlib import Path

import pytest
import torch
from launch import environment
from warm import Warm

from stackgrow.seal.tensors import fingerprint
from stackgrow.titan.shards import fingerprints


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(6, 10, generator=generator),
        "vector": torch.randn(8, generator=generator),
        "odd": torch.randn(5, 3, generator=generator),
    }


def test_every_single_bit_counts() -> None:
    before = fingerprints(tensors())
    for name, index, bit in [
        ("matrix", 0, 0),
        ("matrix", 59, 31),
        ("vector", 7, 22),
        ("odd", 14, 1),
    ]:
        changed = tensors()
        changed[name].view(-1).view(torch.int32)[index] ^= (
            -(2**31) if bit == 31 else 1 << bit
        )
        after = fingerprints(changed)
        assert {n for n in before if before[n] != after[n]} == {name}


@pytest.mark.parametrize(
    "change",
    [lambda m: m.flip(0), lambda m: m.roll(1, 1), lambda m: -m, lambda m: m * 2],
)
def test_moved_and_scaled_values_count(change) -> None:  # type: ignore[no-untyped-def]
    matrix = tensors()["matrix"]
    assert fingerprints({"m": matrix}) != fingerprints(
        {"m": change(matrix).contiguous()}
    )


def test_whole_tensors_need_no_process_group() -> None:
    assert {n: fingerprint(t) for n, t in tensors().items()} == fingerprints(tensors())


SCRIPT = """
import json, sys, torch, torch.distributed as dist
import stackgrow.titan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from stackgrow.titan.shards import fingerprints
sys.path.insert(0, sys.argv[1])
from test_shards import tensors
dist.init_process_group("gloo")
plain = fingerprints(tensors())
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
layouts = [(Replicate(), Replicate()), (Shard(0), Replicate()), (Shard(0), Shard(0)), (Replicate(), Shard(0))]
for layout in layouts:
    sharded = {n: distribute_tensor(t, mesh, layout) for n, t in tensors().items()}
    assert fingerprints(sharded) == plain, layout
two = {"matrix": distribute_tensor(tensors()["matrix"], mesh, (Shard(0), Shard(1)))}
assert fingerprints(two)["matrix"] == plain["matrix"]
dist.destroy_process_group()
"""


def test_fingerprints_are_equal_for_every_sharding(tmp_path: Path) -> None:
    script = tmp_path / "shards.py"
    script.write_text(SCRIPT)
    ranks = Warm(script, [str(Path(__file__).parent)], tmp_path, environment(), ranks=4)
    assert ranks.wait(200) == 0, ranks.output()
