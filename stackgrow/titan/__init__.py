"""One train stage on torchtitan (pinned: 0.2.2); the only room that imports it.

May import: every room below.
Must never know: benchmarks and provenance: whoever hands over a StageJob is called back.

What a port to torchtitan 0.4 changes, file by file (0.4 is not on PyPI yet; known from 0.3.0, which was tried, and
whose wheel was compared with every name that is imported here):

    names.py       RENAMED gets its pairs: attention.wq -> attention.qkv_linear.wq (wk, wv likewise), output -> lm_head.
                   Checkpoints keep their names, those of 0.2.2 load, and nothing outside of this room changes for it
    config.py      JobConfig's sections became classes named Config, each inside of what it builds
    job.py         StageJobConfig, a JobConfig that carries the stage, becomes a Trainer.Config
    spec.py        TrainSpec became protocols.ModelSpec; build_optimizers and build_lr_schedulers became the Configs of
                   OptimizersContainer and LRSchedulersContainer, in components/optimizer
    checkpoint.py  the manager has a Config; what is overridden here is called _load, _save, _maybe_wait_for_staging and
                   _wait_for_saving (load, save, maybe_wait_for_staging, _async_wait). dcp_load, dcp_save, _should_save
                   stay
    model.py       a model is built from Configs, in models/common: the feed-forward's width is stated, RoPE is
                   ComplexRoPE with scaling "none" or "llama", the inner attention must be ScaledDotProductAttention
                   (FlexAttention, the default, has no backward pass on a CPU). Norms of queries and keys, head_dim and
                   biases are torchtitan's own. A tied weight is one FSDP unit with the last norm and the head, under
                   two names: whether tie_head may go is to be tried. ``sum_on_gloo`` is needed as it is
    attention.py   create_attention_mask is in models/common/attention.py; selective recomputation keeps what a subclass
                   of SelectiveAC says in get_save_ops (in dry_run.py, too)
    loss.py        build_cross_entropy_loss became CrossEntropyLoss, which returns two values. Under loss parallel,
                   logits are plain shards (spmd_backend "spmd_types", the default): a chunk's loss is
                   _LossParallelCrossEntropy's
    trainer.py     post_dataloading_process returns three values; train_context is get_spmd_context's; maybe_enable_amp
                   is gone, and FSDP2's policy applied on one rank, too. Pipeline gradients are right there, so that
                   checks.py need not refuse parallel.pipeline
    metrics.py     MetricsProcessor's first argument is its own Config, the others are named
    charts.py      WandBLogger takes a dictionary in the place of JobConfig
    ligo.py        BaseModelArgs and ModelProtocol became protocols.BaseModel and its Config;
                   disable_fsdp_gradient_division is in distributed/fsdp.py
    dry_run.py     as trainer.py, spec.py and attention.py; ParallelDims has no etp
    session.py     nothing; ``set_timeout`` in trainer.py may be torchtitan's own again
    device.py      nothing: ``install`` is needed as it is
    freeze.py, guard.py, new_rate.py, pace.py, shards.py: nothing, they know torch alone. Nor does evaluate/scorer.py
                   change: it gathers plain shards of logits
    tools/bench    side_by_side.py and data_path.py build a plain torchtitan, from Configs then
    pyproject      torch > 2.13, Python 3.11 or newer; torchtitan brings spmd_types, tyro, torch_checkpointing, wandb
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
