"""Scores requests under a run's last checkpoint, on as many ranks as torchrun starts, once for each layout named.

python loglikelihoods.py RUN REQUESTS.json RESULTS.json LAYOUT ...        a layout is a --set, as parallel.tensor=2
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from lm_eval.api.instance import Instance

from stackgrow.data.loader import WindowDataset
from stackgrow.data.tokenizer import Tokenizer
from stackgrow.evaluate.lm import StageLM
from stackgrow.evaluate.scorer import score
from stackgrow.run_folder.choose import choose
from stackgrow.run_folder.folder import RunFolder
from stackgrow.titan import session
from stackgrow.titan.job import StageJob
from stackgrow.titan.trainer import StageTrainer

KINDS = ("loglikelihood", "loglikelihood_rolling")


def main(run: str, requests: str, results: str, *layouts: str) -> None:
    wanted = json.loads(Path(requests).read_text())
    instances = {
        kind: [Instance(kind, {}, tuple(args), 0) for args in wanted[kind]]
        for kind in KINDS
    }
    found = {}
    for layout in layouts:
        chosen = choose(Path(run), sets=[layout, "log.tensorboard=false"])
        assert chosen is not None
        recipe, stage = chosen.plan.recipe, chosen.train_stage
        if not dist.is_initialized():
            session.start(recipe, RunFolder(Path(run)).logs)
        data = WindowDataset.open(recipe.data, recipe.seed)
        manifest = data.stores[0].manifest
        tokenizer = Tokenizer.load(manifest.folder / manifest.tokenizer)
        job = StageJob(recipe, stage, "", chosen.run / stage.name, data)
        trainer = StageTrainer(job)
        trainer.checkpointer.load_weights(chosen.path)
        lm = StageLM(
            lambda rows, trainer=trainer: score(trainer, rows, batch=4),
            tokenizer,
            stage.seq_len,
        )
        found[layout] = {kind: getattr(lm, kind)(instances[kind]) for kind in KINDS}
        trainer.close()
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(found))
    session.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
