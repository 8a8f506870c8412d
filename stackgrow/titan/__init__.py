"""One train stage on torchtitan (pinned: 0.2.2); the only room that imports it.

May import: every room below.
Must never know: benchmarks and provenance: whoever hands over a StageJob is called back.

What a port to torchtitan 0.4 changes, file by file (0.4 is not on PyPI yet; known from 0.3.0, which was tried):

    config.py      0.3 has Python classes in the place of JobConfig's TOML sections: ``job_config`` builds those
    spec.py        the registry of TrainSpecs becomes a model's own config; builders are its methods
    names.py       RENAMED gets its pairs: attention.wq -> attention.qkv_linear.wq (wk, wv likewise), output -> lm_head
    checkpoint.py  the keys of states[MODEL] and states[OPTIMIZER] go through names.py, both ways, so that checkpoints
                   of 0.2.2 load; check that dcp_load, _should_save and _async_wait are still called as here
    model.py       sdpa must be asked for (the default, FlexAttention, has no backward pass on a CPU); RoPE's scaling,
                   the width of the feed-forward layers and freqs_cis are built elsewhere
    attention.py   where an inner attention is put, and the list of what selective recomputation keeps, have moved
    loss.py        logits under loss parallel are plain shards, no DTensors: the whole loss is a sum over the TP group
    trainer.py     forward_backward_step, post_dataloading_process and batch_generator: signatures; _whole and
                   evaluate/scorer.py's logits.full_tensor() must gather plain shards; pipeline gradients are right
                   there, so that checks.py need not refuse parallel.pipeline
    metrics.py     MetricsProcessor is built from its own config; its third argument (see StageMetrics) may be gone
    charts.py      WandBLogger's arguments
    ligo.py        disable_fsdp_gradient_division's place; ModelProtocol's methods
    device.py      ``install`` is needed as it is; so is model.py's ``sum_on_gloo``
    dry_run.py     init_fake_mode, ParallelDims' arguments and the list of selective recomputation
    session.py     init_distributed's arguments; ``set_timeout`` in trainer.py may be torchtitan's own again
    pyproject      torch > 2.13, and its new requirements: spmd_types, tyro, torch_checkpointing, wandb
"""

import importlib.util

from stackgrow.errors import MissingExtraError

if importlib.util.find_spec("triton") is None:
    raise MissingExtraError(
        "training needs the package triton, which torchtitan imports. On Linux: pip install triton. It exists for no "
        "other system; there, recipes can be planned and data prepared"
    )

from stackgrow.titan import device  # first: it must precede torchtitan

device.install()
