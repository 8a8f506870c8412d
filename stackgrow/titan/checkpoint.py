"""torchtitan's CheckpointManager with one rule added: a checkpoint is sealed and verified, or it is ignored.

torchtitan 0.2.2 trains from random weights after a kill in a stage's first save, takes any folder whose name holds
``step-N`` for a checkpoint, loads a model with fewer layers without a word, and unpickles what it finds. Here a
stage loads its newest verified checkpoint, or else the input that it was given, or else (a base stage) nothing; and
what it loaded is compared with what was saved, tensor by tensor.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import (
    MODEL,
    OPTIMIZER,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools.utils import GarbageCollection

from stackgrow import seal
from stackgrow.checkpoint.dcp import (
    METADATA,
    SafePlanner,
    SafeReader,
    is_model_key,
    read_metadata,
    tensor_shapes,
)
from stackgrow.checkpoint.grow import fingerprints_of
from stackgrow.checkpoint.save_planner import OnceEachPlanner
from stackgrow.errors import ChangedError, DamagedError, DiskError, DivergedError
from stackgrow.growth.moments import OPTIMIZER_STATE
from stackgrow.process.ranks import from_rank0, wait_for
from stackgrow.titan.config import checkpoint_config
from stackgrow.titan.job import StageJob
from stackgrow.titan.names import StoredNames
from stackgrow.titan.shards import fingerprints, shard_of

logger = logging.getLogger(__name__)

MOMENTS = "state."  # how AdamW's moments begin in an optimizer's state


class StageCheckpoints(CheckpointManager):
    """Loads and saves the checkpoints of one train stage, those of ``StageFolder.checkpoint``.

    ``records`` gives, on rank 0, what a seal states of the records that were written up to its step.
    """

    def __init__(
        self, job: StageJob, records: Callable[[], dict[str, Any]], **components: Any
    ):
        self.job = job
        self.records = records
        self.sealed_records: dict[str, Any] | None = (
            None  # of the stage's own checkpoint, once one was loaded
        )
        self._unsealed: dict[str, Any] | None = (
            None  # what the seal of the checkpoint that is being written will say
        )
        super().__init__(
            checkpoint_config=checkpoint_config(job),
            base_folder=str(job.folder),
            sd_adapter=None,
            **components,
        )
        for part in (MODEL, OPTIMIZER):
            self.states[part] = StoredNames(self.states[part])

    # Loading

    def load(self, step: int = -1) -> bool:
        """Loads the newest verified checkpoint of this stage, or its input, or nothing for a base stage."""
        newest = self._newest_verified()
        own = newest or self.job.resume
        source = own or self.job.parent
        if source is None:
            self._begin_moments()
            return False
        manifest = seal.read_seal(source)
        if manifest is None:
            raise DamagedError(
                f"{source}: the stage's input is not sealed; run the growth stage again"
            )
        if own and not self.job.is_own(manifest):
            raise ChangedError(
                f"{source} was made by another recipe; move it away or undo the change"
            )

        check_same_tensors(source, self._sealed_tensors(manifest))
        if own:
            self._dcp_load(self._states_to_load(model_only=False), source)
        elif "moments" in manifest:
            self._load_with_grown_moments(source)
        else:
            self._dcp_load(self._states_to_load(model_only=True), source)
        self._check_loaded(source, manifest)
        if newest:
            self.sealed_records = manifest.get("records", {})
        if not own and "moments" not in manifest:
            self._begin_moments()
        logger.info("Loaded and verified %s", source)
        return True

    def load_weights(self, source: Path) -> None:
        """The weights alone of a sealed checkpoint, compared with what was saved."""
        manifest = seal.read_seal(source)
        if manifest is None:
            raise DamagedError(f"{source} is not a sealed checkpoint; name another")
        manifest.pop("moments", None)
        check_same_tensors(source, self._sealed_tensors(manifest))
        self._dcp_load(self._states_to_load(model_only=True), source)
        self._check_loaded(source, manifest)

    def _load_with_grown_moments(self, source: Path) -> None:
        """Of the optimizer the moments alone: rates, betas and so on are this stage's."""
        optimizer = self.states[OPTIMIZER].state_dict()
        moments = {
            name: state for name, state in optimizer.items() if name.startswith(MOMENTS)
        }
        states = self._states_to_load(model_only=True)
        states[OPTIMIZER] = moments
        self._dcp_load(states, source)
        self.states[OPTIMIZER].load_state_dict({**optimizer, **moments})

    def _dcp_load(self, states: dict[str, Any], source: Path) -> None:
        self.dcp_load(states, str(source), from_hf=False, from_quantized=False)

    def dcp_load(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        from_hf: bool,
        from_quantized: bool,
    ) -> None:
        """As in torchtitan, through a reader and a planner that unpickle nothing but DCP's own metadata."""
        try:
            dcp.load(
                state_dict,
                storage_reader=SafeReader(checkpoint_id),
                planner=SafePlanner(),
            )
        except (
            CheckpointException
        ) as error:  # no Exception, and all ranks' tracebacks in one
            raise DamagedError(
                f"{checkpoint_id} is not loaded: {_first_failure(error)}"
            ) from error
        self.states[MODEL].load_state_dict(state_dict)

    def _check_loaded(self, source: Path, manifest: dict[str, Any]) -> None:
        loaded = fingerprints(self._sealed_tensors(manifest))
        saved = fingerprints_of(manifest)
        wrong = sorted(name for name in loaded if saved.get(name) != loaded[name])
        if wrong:
            raise DamagedError(
                f"{source}: {len(wrong)} of {len(loaded)} tensors are not what was saved after loading, "
                f"first {wrong[0]}; the checkpoint is damaged or was made for another model"
            )

    def _newest_verified(self) -> Path | None:
        """The newest sealed checkpoint whose files are whole; damaged ones are moved aside and told of."""
        while True:
            checkpoint = from_rank0(self._newest_sealed)
            if checkpoint is None:
                return None
            faults = self._faults(checkpoint)
            if not faults:
                wait_for(checkpoint / METADATA)
                return checkpoint
            if dist.get_rank() == 0:
                moved = seal.move_to_quarantine(checkpoint)
                logger.warning(
                    "Damaged checkpoint moved to %s: %s", moved, "; ".join(faults)
                )

    def _newest_sealed(self) -> Path | None:
        files = self.job.files
        for moved in seal.quarantine_unsealed(files.checkpoints):
            logger.warning("Incomplete checkpoint moved to %s", moved)
        steps = files.sealed_steps()
        return files.checkpoint(steps[-1]) if steps else None

    def _faults(self, checkpoint: Path) -> list[str]:
        """What is wrong with the files of a sealed checkpoint, of which every rank looks at its share."""
        wait_for(checkpoint / seal.MANIFEST)
        manifest = seal.read_seal(checkpoint)
        assert manifest is not None
        hashes = 1 if self.job.recipe.checkpoint.verify == "sampled" else None
        own = seal.damage(
            checkpoint, manifest, dist.get_rank(), dist.get_world_size(), hashes=hashes
        )
        of_all_ranks = set()
        for faults in _gathered(own):
            of_all_ranks.update(faults)
        return sorted(of_all_ranks)

    # Saving

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        if not self._should_save(curr_step, last_step):
            return
        weights = self.weights()
        moments = self._moments()
        all_fingerprints = fingerprints({**weights, **moments})
        self._refuse_nonfinite(curr_step)
        self._require_space(curr_step)
        with self._writing(curr_step):
            super().save(curr_step, last_step)
        self._unsealed = {
            "step": curr_step,
            "position": self.job.stage.place(curr_step)["position"],
            "stage_hash": self.job.stage_hash,
            "session": self.job.session,
            "records": self.records(),
            "tensors": {name: all_fingerprints[name] for name in sorted(weights)},
            "moments": {name: all_fingerprints[name] for name in sorted(moments)},
        }
        if last_step or self.async_mode == AsyncMode.DISABLED:
            self._seal()

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """As in torchtitan, through a planner that pickles equal values once."""
        if async_mode != AsyncMode.DISABLED:
            return super().dcp_save(
                state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
            )
        dcp.save(state_dict, checkpoint_id=checkpoint_id, planner=OnceEachPlanner())
        if enable_garbage_collection:
            GarbageCollection.collect("after a checkpoint was written")
        return None

    def finish(self) -> None:
        """Waits for a checkpoint that is still being written, and seals it."""
        self._async_wait()

    def _async_wait(self) -> None:
        step = self._unsealed["step"] if self._unsealed else 0
        with self._writing(step):
            super()._async_wait()
        self._seal()

    def _refuse_nonfinite(self, step: int) -> None:
        """A model with a NaN or infinite weight is never saved, so that the last good checkpoint stays the newest."""
        finite_tensors = []
        for weight in self.weights().values():
            finite_tensors.append(torch.isfinite(shard_of(weight).local).all())
        finite = torch.stack(finite_tensors).all().to(torch.int32)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():
            raise DivergedError(
                f"{self.job.stage.name}: weights are not finite at step {step}"
            )

    def _require_space(self, step: int) -> None:
        """All ranks stop before a checkpoint is begun that does not fit on the disk."""
        lack = from_rank0(self._lack_of_space)
        if lack:
            raise DiskError(
                f"{self.job.stage.name}: disk full, the checkpoint of step {step} {lack}; the one before it is "
                f"intact. Make room ({self.job.files.quarantine} may go), then give the same command again"
            )

    def _lack_of_space(self) -> str | None:
        return seal.lack_of_space(self.job.folder, self.job.stage.checkpoint_bytes)

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """DCP makes all ranks fail together; what one of them wrote by then is of no use and takes room."""
        try:
            yield
        except CheckpointException as error:
            checkpoint = self.job.files.checkpoint(step)
            lack = self._lack_of_space()
            if dist.get_rank() == 0:
                shutil.rmtree(checkpoint, ignore_errors=True)
            disk_full = "disk full, " if lack else ""
            reason = lack or _first_failure(error)
            raise DiskError(
                f"{self.job.stage.name}: {disk_full}{checkpoint} could not be written ({reason}) and is removed; the "
                "checkpoint before it is intact. Make room or restore access, then give the same command again"
            ) from error

    def _seal(self) -> None:
        """Every rank hashes its share of the files; rank 0 writes the seal, then drops what is not kept."""
        facts = self._unsealed
        self._unsealed = None
        if facts is None:
            return
        checkpoint = self.job.files.checkpoint(facts["step"])
        names = from_rank0(lambda: seal.contents(checkpoint))
        own_names = names[dist.get_rank() :: dist.get_world_size()]
        shares = _gathered(seal.file_records(checkpoint, own_names))
        if dist.get_rank() == 0:
            files = {}
            for share in shares:
                files.update(share)
            seal.seal(checkpoint, files, facts)
            last_step = self.job.stage.steps
            seal.purge(
                checkpoint.parent, self.job.recipe.checkpoint.keep, always=(last_step,)
            )
        dist.barrier()

    # What is in memory

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors, by their names in a checkpoint."""
        return self.states[MODEL].state_dict()

    def _moments(self) -> dict[str, torch.Tensor]:
        """AdamW's state by its names in a checkpoint; made, as after a step without gradients, where there is none."""
        state = self.states[OPTIMIZER].state_dict()
        return {
            f"{OPTIMIZER}.{name}": value
            for name, value in state.items()
            if name.startswith(MOMENTS)
        }

    def _begin_moments(self) -> None:
        """Gives every parameter the state that AdamW would make in its first step: a checkpoint then holds those of
        frozen ones too, and all where no step has made an update yet."""
        for name, state in self._moments().items():
            if name.endswith(".step"):
                state.zero_()

    def _sealed_tensors(self, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All that a seal has fingerprints of, as it is in memory."""
        tensors = self.weights()
        if "moments" in manifest:
            tensors = {**tensors, **self._moments()}
        return tensors


def _gathered(own: Any) -> list[Any]:
    """Collective: what every rank has, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts


def _first_failure(error: CheckpointException) -> str:
    """The first rank's failure, in a line."""
    failure = next(iter(error.failures.values()))[0]
    lines = str(failure).splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def check_same_tensors(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The model's tensors in a checkpoint and in memory must be equal in names, shapes and dtypes, and AdamW's too
    where ``tensors`` hold them: DCP itself passes over what a smaller model does not ask for.

    Raises:
        DamagedError: naming the first differences.
    """
    wanted = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    with_moments = not all(is_model_key(name) for name in wanted)
    stored = {}
    for name, shape_and_dtype in tensor_shapes(read_metadata(source)).items():
        if is_model_key(name) or (with_moments and name.startswith(OPTIMIZER_STATE)):
            stored[name] = shape_and_dtype

    faults = [f"{name} is missing" for name in wanted if name not in stored]
    for name in wanted:
        if name in stored and stored[name] != wanted[name]:
            faults.append(f"{name} is {stored[name]}, the model has {wanted[name]}")
    faults += [f"{name} is not in the model" for name in stored if name not in wanted]
    if faults:
        raise DamagedError(f"{source} does not fit the model: " + "; ".join(faults[:5]))
