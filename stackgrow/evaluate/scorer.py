"""Log-likelihoods of rows of tokens under a stage's model, its data-parallel ranks sharing the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from stackgrow.errors import EvaluationError

if TYPE_CHECKING:
    from stackgrow.titan.trainer import StageTrainer


class Row(NamedTuple):
    """Token ids, and how many of the last are scored."""

    ids: list[int]
    scored: int


class RowScore(NamedTuple):
    """The log-likelihood of a row's scored tokens given those before, and whether each of them is the likeliest."""

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def score(trainer: StageTrainer, rows: Sequence[Row], batch: int) -> list[RowScore]:
    """The score of every row. Collective: every rank gives the same rows and gets all results.

    Rows go by length, ``batch`` to a rank; in every round each rank makes one forward pass, with nothing in it for
    those that the rows do not suffice for.
    """
    dims = trainer.parallel_dims
    mesh = dims.get_mesh("batch") if dims.dp_enabled else None
    ranks, rank = 1, 0
    if mesh:
        ranks, rank = mesh.size(), mesh.get_local_rank()

    longest_first = sorted(
        range(len(rows)), key=lambda number: len(rows[number].ids), reverse=True
    )
    results = torch.zeros(len(rows), 2, dtype=torch.float64, device=trainer.device)
    with trainer.evaluating():
        for start in range(0, len(rows), ranks * batch):
            round_of_all = longest_first[start : start + ranks * batch]
            mine = round_of_all[rank * batch : (rank + 1) * batch]
            # The last token of a row is never an input: there is nothing after it to predict.
            logits = _logits(trainer, [rows[number].ids[:-1] for number in mine], batch)
            for number, row_logits in zip(mine, logits, strict=False):
                results[number] = _scored(row_logits, rows[number])
    if mesh:
        dist.all_reduce(
            results, group=mesh.get_group()
        )  # each row is zero but on the rank that scored it
    return [RowScore(float(value), bool(greedy)) for value, greedy in results.tolist()]


def _logits(trainer: StageTrainer, inputs: Sequence[list[int]], batch: int) -> Tensor:
    """Logits [rows, positions, V] of rows of token ids, which are filled up on the right: no position sees that.

    A compiled model gets one shape, so that it is not compiled anew for each; tensor parallel splits the positions.
    """
    stage = trainer.stage_job.stage
    if stage.train.compile:
        count, length = batch, stage.seq_len
    else:
        longest = max((len(ids) for ids in inputs), default=1)
        count = max(1, len(inputs))
        length = (
            math.ceil(max(1, longest) / stage.parallel.tensor) * stage.parallel.tensor
        )
    tokens = torch.zeros(count, length, dtype=torch.int64)
    for row, ids in zip(tokens, inputs, strict=False):
        row[: len(ids)] = torch.tensor(ids)

    dims = trainer.parallel_dims
    tensor_mesh = dims.get_mesh("tp") if dims.tp_enabled else None
    with trainer.maybe_enable_amp:
        logits: Tensor = trainer.model_parts[0](tokens.to(trainer.device))
    return whole_vocabulary(logits, stage.model.vocab_size, tensor_mesh)


def whole_vocabulary(
    logits: Tensor, vocab_size: int, mesh: DeviceMesh | None
) -> Tensor:
    """Logits [rows, positions, V], of which the ranks of ``mesh``, tensor parallel, may each hold a part of V: as a
    DTensor, or as a plain tensor of V / ranks, as torchtitan from 0.3 on returns them to a loss that is parallel, too.

    Raises:
        EvaluationError: they are neither whole nor such a part.
    """
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if logits.shape[-1] != vocab_size and mesh is not None:
        shape = torch.Size([*logits.shape[:-1], vocab_size])
        stride = (shape[1] * vocab_size, vocab_size, 1)
        logits = DTensor.from_local(
            logits, mesh, [Shard(2)], shape=shape, stride=stride
        ).full_tensor()
    if logits.shape[-1] != vocab_size:
        raise EvaluationError(
            f"the model gives {logits.shape[-1]} logits for a vocabulary of {vocab_size}: benchmarks do not know this "
            "way to split them; leave [eval] out, and evaluate an export"
        )
    return logits


def _scored(logits: Tensor, row: Row) -> Tensor:
    """(log-likelihood, all likeliest) of a row's scored tokens, from its logits [positions, V]: those at a position
    predict the token after it."""
    end = len(row.ids) - 1
    predicted = torch.log_softmax(logits[end - row.scored : end].float(), dim=-1)
    wanted = torch.tensor(row.ids[-row.scored :], device=logits.device)
    likelihood = predicted.gather(1, wanted[:, None]).sum(dtype=torch.float64)
    greedy = (predicted.argmax(dim=-1) == wanted).all()
    return torch.stack([likelihood, greedy.double()])
