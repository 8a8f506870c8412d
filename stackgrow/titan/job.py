"""A train stage that is ready to run, and how it travels through torchtitan: inside of its JobConfig."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torchtitan.config import job_config as titan

from stackgrow.data.loader import WindowDataset
from stackgrow.plan.stages import TrainStage
from stackgrow.recipe.keys import Recipe
from stackgrow.run_folder.extended import is_made_by
from stackgrow.run_folder.folder import StageFolder

if TYPE_CHECKING:
    from stackgrow.titan.trainer import StageTrainer


@dataclass
class StageJob:
    """One train stage, ready to run: where it reads, where it writes, and what it must start from.

    The job's owner is called back for what titan knows nothing of: provenance, a stage's end that the loss has
    decided, benchmarks.
    """

    recipe: Recipe
    stage: TrainStage
    stage_hash: str
    folder: Path  # the stage's
    data: WindowDataset

    # What the stage starts from. Without any of these: from random weights.
    parent: Path | None = None  # the grown checkpoint
    source: Path | None = (
        None  # of a LearnStage, whose own weights start at random: what its maps are learned on
    )
    resume: Path | None = (
        None  # a checkpoint of this stage in another run folder, to go on from where this has none
    )

    # The stage was shorter once: hash of that -> the last step whose checkpoint of it is this stage's, too.
    shorter: Mapping[str, int] = field(default_factory=dict)

    finds_end: bool = False  # the loss has yet to decide at which step the stage ends
    session: str = ""  # the identity of this session in the run's provenance, on rank 0

    on_resume: Callable[[int], None] | None = (
        None  # rank 0: the step that training goes on from
    )
    on_end_found: Callable[[int, float], None] | None = (
        None  # rank 0: the last step, and by what the loss fell
    )
    after_step: Callable[[StageTrainer], None] | None = (
        None  # every rank, after each step and before the first
    )

    @property
    def files(self) -> StageFolder:
        return StageFolder(self.folder)

    @property
    def data_ranks(self) -> int:
        """Ranks that have batches of their own, of those that there are now."""
        return dist.get_world_size() // self.stage.parallel.tensor

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass on one rank."""
        return self.stage.micro_batch(self.data_ranks)

    def is_own(self, manifest: Mapping[str, Any]) -> bool:
        """Whether a sealed checkpoint is one that this stage makes."""
        return is_made_by(manifest, self.stage_hash, self.shorter)

    def micro_batches(self, step: int) -> int:
        """Forward passes of each rank in one optimizer step, whose gradients accumulate."""
        tokens_per_pass = self.stage.seq_len * self.data_ranks * self.micro_batch
        return self.stage.batches.at(step) // tokens_per_pass


@dataclass
class StageJobConfig(titan.JobConfig):
    """torchtitan's JobConfig, carrying the stage to the builders in spec.py."""

    stage_job: StageJob | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """For a log, such as wandb's: without the stage's data and callbacks."""
        sections = {
            name: value for name, value in vars(self).items() if name != "stage_job"
        }
        return {name: asdict(section) for name, section in sections.items()}
