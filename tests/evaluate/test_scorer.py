"""What the scorer takes for a whole: logits over all of the vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from stackgrow.errors import EvaluationError
from stackgrow.evaluate.scorer import whole_vocabulary

VOCABULARY = 7  # which two ranks do not divide
LOGITS = torch.arange(2.0 * 3 * VOCABULARY).reshape(2, 3, VOCABULARY)


def on_two_ranks(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    part = LOGITS.chunk(2, dim=-1)[rank]
    sharded = DTensor.from_local(
        part, mesh, [Shard(2)], shape=LOGITS.shape, stride=LOGITS.stride()
    )
    replicated = DTensor.from_local(LOGITS, mesh, [Replicate()])
    for logits in (part, sharded, replicated, LOGITS):
        assert torch.equal(whole_vocabulary(logits, VOCABULARY, mesh), LOGITS)
    dist.destroy_process_group()


def test_parts_of_the_vocabulary_are_gathered(tmp_path: Path) -> None:
    """Plain ones, too, as a loss that is parallel takes them; each rank's alone would give wrong likelihoods."""
    torch.multiprocessing.spawn(on_two_ranks, (str(tmp_path / "store"),), nprocs=2)


def test_logits_of_another_vocabulary_are_refused() -> None:
    assert whole_vocabulary(LOGITS, VOCABULARY, None) is LOGITS
    with pytest.raises(
        EvaluationError, match="the model gives 3 logits for a vocabulary of 7"
    ):
        whole_vocabulary(LOGITS[..., :3], VOCABULARY, None)
