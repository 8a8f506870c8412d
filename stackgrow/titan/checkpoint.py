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
from torchtitan.components.checkpoint import MODEL, OPTIMIZER, AsyncMode, CheckpointManager
from torchtitan.config import job_config as titan

from stackgrow import seal
from stackgrow.checkpoint.dcp import METADATA, SafePlanner, SafeReader, is_model_key, read_metadata, tensor_shapes
from stackgrow.checkpoint.grow import fingerprints_of
from stackgrow.errors import ChangedError, DamagedError, DiskError, DivergedError
from stackgrow.growth.moments import OPTIMIZER_STATE
from stackgrow.process.ranks import from_rank0, wait_for
from stackgrow.titan.job import StageJob
from stackgrow.titan.shards import fingerprints, shard_of

logger = logging.getLogger(__name__)


class StageCheckpoints(CheckpointManager):
    """Loads and saves the checkpoints of one train stage under ``<stage>/checkpoint/step-N``."""

    def __init__(self, job: StageJob, records: Callable[[], dict[str, Any]], **components: Any):
        self.job, self.records = job, records
        self.sealed_records: dict[str, Any] | None = None  # of the stage's own checkpoint, once one was loaded
        self._unsealed: tuple[int, dict[str, Any]] | None = None
        super().__init__(
            checkpoint_config=checkpoint_config(job),
            base_folder=str(job.folder),
            sd_adapter=None,
            **components,
        )

    def load(self, step: int = -1) -> bool:
        """Loads the newest verified checkpoint of this stage, or its input, or nothing for a base stage."""
        own = self._newest_verified()
        folder = own or self.job.resume
        if folder is None and self.job.parent is None:
            self._begin_moments()
            return False
        source = folder or self.job.parent
        assert source is not None
        manifest = seal.read_seal(source)
        if manifest is None:
            raise DamagedError(f"{source}: the stage's input is not sealed; run the growth stage again")
        if folder is not None and manifest["stage_hash"] != self.job.stage_hash:
            raise ChangedError(f"{source} was made by another recipe; move it away or undo the change")
        states = self._states_to_load(model_only=folder is None)
        check_same_tensors(source, self._sealed(manifest))
        if grown_moments := folder is None and "moments" in manifest:
            optimizer = self.states[OPTIMIZER].state_dict()  # whose rates, betas and so on are this stage's
            states[OPTIMIZER] = {name: state for name, state in optimizer.items() if name.startswith("state.")}
        self.dcp_load(states, str(source), from_hf=False, from_quantized=False)
        if grown_moments:
            self.states[OPTIMIZER].load_state_dict({**optimizer, **states[OPTIMIZER]})
        self._check_loaded(source, manifest)
        if own is not None:
            self.sealed_records = manifest.get("records", {})
        if folder is None and not grown_moments:
            self._begin_moments()
        logger.info("Loaded and verified %s", source)
        return True

    def load_weights(self, source: Path) -> None:
        """The weights alone of a sealed checkpoint, compared with what was saved."""
        manifest = seal.read_seal(source)
        if manifest is None:
            raise DamagedError(f"{source} is not a sealed checkpoint; name another")
        weights = {name: value for name, value in manifest.items() if name != "moments"}
        check_same_tensors(source, self._sealed(weights))
        self.dcp_load(self._states_to_load(model_only=True), str(source), from_hf=False, from_quantized=False)
        self._check_loaded(source, weights)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As in torchtitan, through a reader and a planner that unpickle nothing but DCP's own metadata."""
        try:
            dcp.load(state_dict, storage_reader=SafeReader(checkpoint_id), planner=SafePlanner())
        except CheckpointException as error:  # no Exception, and all ranks' tracebacks in one
            raise DamagedError(f"{checkpoint_id} is not loaded: {_first(error)}") from error
        self.states[MODEL].load_state_dict(state_dict)

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        if not self._should_save(curr_step, last_step):
            return
        prints = fingerprints({**self._weights(), **self._moments()})
        self._refuse_nonfinite(curr_step)
        self._require_space(curr_step)
        with self._writing(curr_step):
            super().save(curr_step, last_step)
        facts = {
            "step": curr_step,
            "position": self.job.stage.place(curr_step)["position"],
            "stage_hash": self.job.stage_hash,
            "session": self.job.session,
            "records": self.records(),
            "tensors": {name: mark for name, mark in prints.items() if is_model_key(name)},
            "moments": {name: mark for name, mark in prints.items() if not is_model_key(name)},
        }
        self._unsealed = (curr_step, facts)
        if last_step or self.async_mode == AsyncMode.DISABLED:
            self._seal()

    def finish(self) -> None:
        """Waits for a checkpoint that is still being written, and seals it."""
        self._async_wait()

    def _async_wait(self) -> None:
        with self._writing(self._unsealed[0] if self._unsealed else 0):
            super()._async_wait()
        self._seal()

    def _require_space(self, step: int) -> None:
        """All ranks stop before a checkpoint is begun that does not fit on the disk."""
        if lack := from_rank0(self._lack_of_space):
            raise DiskError(
                f"{self.job.stage.name}: disk full, the checkpoint of step {step} {lack}; the one before it is "
                f"intact. Make room ({self.job.folder / 'quarantine'} may go), then give the same command again"
            )

    def _lack_of_space(self) -> str | None:
        return seal.lack_of_space(self.job.folder, self.job.stage.checkpoint_bytes)

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """DCP makes all ranks fail together; what one of them wrote by then is of no use and takes room."""
        try:
            yield
        except CheckpointException as error:
            folder = Path(self._create_checkpoint_id(step))
            lack = self._lack_of_space()
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise DiskError(
                f"{self.job.stage.name}: {'disk full, ' if lack else ''}{folder} could not be written "
                f"({lack or _first(error)}) and is removed; the checkpoint before it is intact. Make room or restore "
                "access, then give the same command again"
            ) from error

    def _seal(self) -> None:
        """Every rank hashes its share of the files; rank 0 writes the seal, then drops what is not kept."""
        if self._unsealed is None:
            return
        (step, facts), self._unsealed = self._unsealed, None
        folder = Path(self._create_checkpoint_id(step))
        rank, world = dist.get_rank(), dist.get_world_size()
        parts: list[Any] = [None] * world
        names = from_rank0(lambda: seal.contents(folder))
        dist.all_gather_object(parts, seal.file_records(folder, names[rank::world]))
        if rank == 0:
            seal.seal(folder, {name: r for part in parts for name, r in part.items()}, facts)
            seal.purge(folder.parent, self.job.recipe.checkpoint.keep, always=(self.job.stage.steps,))
        dist.barrier()

    def _newest_verified(self) -> Path | None:
        """The newest sealed checkpoint whose files are whole; damaged ones are moved aside and told of."""
        while path := from_rank0(self._newest_sealed):
            wait_for(path / seal.MANIFEST)
            manifest = seal.read_seal(path)
            assert manifest is not None
            faults: list[Any] = [None] * dist.get_world_size()
            hashes = 1 if self.job.recipe.checkpoint.verify == "sampled" else None
            part = seal.damage(path, manifest, dist.get_rank(), dist.get_world_size(), hashes=hashes)
            dist.all_gather_object(faults, part)
            found = sorted({fault for parts in faults for fault in parts})
            if not found:
                wait_for(path / METADATA)
                return path
            if dist.get_rank() == 0:
                moved = seal.move_to_quarantine(path)
                logger.warning("Damaged checkpoint moved to %s: %s", moved, "; ".join(found))
        return None

    def _newest_sealed(self) -> Path | None:
        folder = Path(self.folder)
        for moved in seal.quarantine_unsealed(folder):
            logger.warning("Incomplete checkpoint moved to %s", moved)
        steps = seal.sealed_steps(folder)
        return folder / seal.step_name(steps[-1]) if steps else None

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.states[MODEL].state_dict()

    def _moments(self) -> dict[str, torch.Tensor]:
        """AdamW's state by its names in a checkpoint; made, as after a step without gradients, where there is none."""
        state = self.states[OPTIMIZER].state_dict()
        return {f"{OPTIMIZER}.{name}": value for name, value in state.items() if name.startswith("state.")}

    def _begin_moments(self) -> None:
        """Gives every parameter the state that AdamW would make in its first step: a checkpoint then holds those of
        frozen ones too, and all where no step has made an update yet."""
        for name, state in self._moments().items():
            if name.endswith(".step"):
                state.zero_()

    def _sealed(self, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
        """All that a seal has fingerprints of, as it is in memory."""
        return {**self._weights(), **(self._moments() if "moments" in manifest else {})}

    def _check_loaded(self, source: Path, manifest: dict[str, Any]) -> None:
        loaded, marks = fingerprints(self._sealed(manifest)), fingerprints_of(manifest)
        wrong = sorted(name for name in loaded if marks.get(name) != loaded[name])
        if wrong:
            raise DamagedError(
                f"{source}: {len(wrong)} of {len(loaded)} tensors are not what was saved after loading, "
                f"first {wrong[0]}; the checkpoint is damaged or was made for another model"
            )

    def _refuse_nonfinite(self, step: int) -> None:
        """A model with a NaN or infinite weight is never saved, so that the last good checkpoint stays the newest."""
        finite = torch.stack([torch.isfinite(shard_of(w).local).all() for w in self._weights().values()]).all()
        finite = finite.to(torch.int32)
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():
            raise DivergedError(f"{self.job.stage.name}: weights are not finite at step {step}")


def _first(error: CheckpointException) -> str:
    """The first rank's failure, in a line."""
    failure = next(iter(error.failures.values()))[0]
    return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"


def check_same_tensors(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The model's tensors in a checkpoint and in memory must be equal in names, shapes and dtypes, and AdamW's too
    where ``tensors`` hold them: DCP itself passes over what a smaller model does not ask for.

    Raises:
        DamagedError: naming the first differences.
    """
    wanted = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    more = () if all(map(is_model_key, wanted)) else (OPTIMIZER_STATE,)
    stored = {n: s for n, s in tensor_shapes(read_metadata(source)).items() if is_model_key(n) or n.startswith(more)}
    faults = [f"{n} is missing" for n in wanted if n not in stored]
    faults += [
        f"{n} is {stored[n]}, the model has {wanted[n]}" for n in wanted if n in stored and stored[n] != wanted[n]
    ]
    faults += [f"{n} is not in the model" for n in stored if n not in wanted]
    if faults:
        raise DamagedError(f"{source} does not fit the model: " + "; ".join(faults[:5]))


def checkpoint_config(job: StageJob) -> titan.Checkpoint:
    """Full checkpoints throughout, the last included (a finished stage can be extended and audited); nothing is
    purged by torchtitan, which counts torn and foreign folders as checkpoints: see checkpoint.py."""
    recipe = job.recipe
    return titan.Checkpoint(
        enable=True,
        interval=job.stage.every(recipe.checkpoint.interval),
        last_save_model_only=False,
        keep_latest_k=0,
        async_mode=recipe.checkpoint.async_mode,
    )
