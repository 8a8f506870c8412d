"""The keys of a recipe, each with what it may be; load.py reads them, checks.py says how they fit.

The dataclasses below are the only description of the keys: parsing, defaults, ``recipe.schema.json`` and the
reference in recipes/REFERENCE.md come from them. Nothing here imports torch: a recipe is read in milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from stackgrow.recipe import values
from stackgrow.recipe.families import ALWAYS_STATED, FAMILIES, GIVEN, Family
from stackgrow.recipe.values import Duration, Kind, Phase, Rewarm, Share

# The operators' names alone, for the schema. What each one is stands in growth/operators.py, which this room must not
# know; a test keeps the two equal.
OPERATORS = ("stack", "split", "zero", "random", "learn", "shrink")
MAX_WIDTH = (
    2**16
)  # planning a growth takes memory and time with every channel; GPT-3 has 12,288


class _Required:
    """In the place of a default where there is none."""


REQUIRED = _Required()


def key(
    kind: Kind,
    help: str,
    default: Any = REQUIRED,
    *,
    free: bool = False,
    or_table: type | None = None,
    typed_only: bool = False,
) -> Any:
    """A recipe key, required when no default is given. ``free`` keys place and watch the work (ranks, paths,
    logging) without defining the trained model: they may change between two sessions of one run. The value may be
    a table, too, where ``or_table`` describes one. A ``typed_only`` key is taken from the command line alone, and is
    never written into a recipe: a stranger's recipe must not name a command that is run."""
    required = default is REQUIRED
    metadata = {
        "kind": kind,
        "help": help,
        "required": required,
        "free": free,
        "or_table": or_table,
        "typed_only": typed_only,
    }
    return field(default=None if required else default, metadata=metadata)


def table(
    cls: type,
    help: str,
    *,
    required: bool = False,
    optional: bool = False,
    many: bool = False,
) -> Any:
    """A table ``[name]`` described by ``cls``. When absent, it is filled with defaults; an ``optional`` one
    is None, and ``many`` (an array of tables ``[[name]]``) are ()."""
    metadata = {
        "table": cls,
        "help": help,
        "required": required,
        "optional": optional,
        "many": many,
    }
    return field(default=() if many else None, metadata=metadata)


def overrides(cls: type, help: str) -> Any:
    """A table that overrides single keys of the top-level table ``cls``."""
    return field(default_factory=dict, metadata={"overrides": cls, "help": help})


@dataclass(frozen=True)
class Budget:
    tokens: int = key(
        values.tokens(), "tokens trained over all stages, the base's included"
    )


@dataclass(frozen=True)
class Mix:
    """One store of a mixture."""

    path: str = key(
        values.path(),
        "folder of a token store written by tools/prepare_data.py",
        free=True,
    )
    weight: float = key(
        values.number(above=True),
        "its share of the sequences, relative to the other weights",
    )


@dataclass(frozen=True)
class Data:
    path: str = key(
        values.path(),
        "folder of a token store written by tools/prepare_data.py",
        "",
        free=True,
    )
    mix: tuple[Mix, ...] = table(
        Mix, "instead of path: a mixture of token stores", many=True
    )
    tokenizer: str = key(
        values.sha256(),
        "SHA-256 of the tokenizer file that the stores must be made with",
        "",
        free=True,
    )
    seq_len: int = key(values.integer(2, 2**20), "tokens in one training sequence")
    document_mask: bool = key(
        values.boolean(),
        'no attention from one document to another; needs train.attention = "flex"',
        False,
    )
    workers: int = key(
        values.integer(0, 256),
        "loader processes per rank; 0 loads in the trainer",
        0,
        free=True,
    )

    @property
    def stores(self) -> list[tuple[str, float]]:
        """(path, weight) of every store."""
        if not self.mix:
            return [(self.path, 1.0)]
        return [(mix.path, mix.weight) for mix in self.mix]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies, for texts longer than those it was first trained on."""

    factor: float = key(
        values.number(1), "the longest wavelengths become this much longer"
    )
    low_freq_factor: float = key(
        values.number(above=True),
        "wavelengths above original_length / this are scaled in full",
        1.0,
    )
    high_freq_factor: float = key(
        values.number(above=True),
        "wavelengths below original_length / this stay",
        4.0,
    )
    original_length: int = key(
        values.integer(2), "tokens in a text before the scaling", 8192
    )


@dataclass(frozen=True)
class Model:
    """A decoder with RMSNorm, a SwiGLU layer and RoPE; what its family says stands in families.py."""

    family: str = key(
        values.choice(*FAMILIES), "architecture, and the defaults of the keys below"
    )
    dim: int = key(values.integer(2, MAX_WIDTH), "hidden width D")
    n_layers: int = key(values.integer(1, 4096), "number of layers L")
    n_heads: int = key(values.integer(1, MAX_WIDTH), "attention heads")
    n_kv_heads: int = key(
        values.integer(0, MAX_WIDTH),
        "key/value heads (grouped-query attention); 0 means n_heads",
        0,
    )
    ffn_dim: int = key(
        values.integer(1, 4 * MAX_WIDTH), "width F of the SwiGLU layer, exactly"
    )
    vocab_size: int = key(
        values.integer(2, 2**22),
        "vocabulary V: the token store's, or a multiple of 64 that pads it",
    )
    norm_eps: float = key(
        values.number(0, 1, above=True),
        "epsilon of RMSNorm; default: the family's",
        None,
    )
    rope_theta: float = key(
        values.number(1), "base of the rotary frequencies; default: the family's", None
    )
    init: str = key(
        values.choice("paper", "torchtitan", "torch"),
        "initialization: \"paper\" N(0, sqrt(2/(5 d_in))), MLP output N(0, 1/(sqrt(d_in) L)); torchtitan's; or torch's "
        "own, embedding N(0, 1), which the published base and scratch runs have",
        "paper",
    )
    head_dim_: int | None = key(
        values.integer(2, MAX_WIDTH),
        "width of a head; default: the family's, or dim / n_heads",
        None,
    )
    tie_embeddings: bool = key(
        values.boolean(),
        "the output head is the embedding's matrix; default: the family's",
        None,
    )
    qk_norm: bool = key(
        values.boolean(),
        "RMSNorm over each query's and each key's head; default: the family's",
        None,
    )
    attention_bias: bool = key(
        values.boolean(),
        "biases of queries, keys and values; default: the family's",
        None,
    )
    rope_scaling: RopeScaling | None = table(
        RopeScaling,
        "Llama 3.1's scaled rotary frequencies; without the table, they are not scaled",
        optional=True,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        for name in GIVEN:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self._family, name))

    @property
    def _family(self) -> Family:
        return FAMILIES[self.family or "llama2"]

    @property
    def implied(self) -> set[str]:
        """The keys that need not be stated, the family saying the same."""
        return {
            name
            for name in GIVEN
            if name not in ALWAYS_STATED
            and getattr(self, name) == getattr(self._family, name)
        }

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.head_dim_ or self._family.head_dim or self.dim // self.n_heads

    @property
    def states_head_dim(self) -> bool:
        """Whether heads have a width of their own, whatever dim / n_heads is."""
        return bool(self.head_dim_ or self._family.head_dim)

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.n_heads * self.head_dim

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """One layer's parameter names -> shapes. D width, F FFN width, Q and KV widths of all query and of all
        key/value heads."""
        D = self.dim
        F = self.ffn_dim
        Q = self.query_width
        KV = self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "attention.wq.weight": (Q, D),
            "attention.wk.weight": (KV, D),
            "attention.wv.weight": (KV, D),
            "attention.wo.weight": (D, Q),
            "feed_forward.w1.weight": (F, D),
            "feed_forward.w2.weight": (D, F),
            "feed_forward.w3.weight": (F, D),
            "attention_norm.weight": (D,),
            "ffn_norm.weight": (D,),
        }
        if self.attention_bias:
            shapes["attention.wq.bias"] = (Q,)
            shapes["attention.wk.bias"] = (KV,)
            shapes["attention.wv.bias"] = (KV,)
        if self.qk_norm:
            shapes["attention.q_norm.weight"] = (self.head_dim,)
            shapes["attention.k_norm.weight"] = (self.head_dim,)
        return shapes

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Parameter names (torchtitan's) -> shapes, in model order. D width, V vocabulary. A tied head has none."""
        D = self.dim
        V = self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (V, D)}
        for layer in range(self.n_layers):
            for name, shape in self.layer_tensors().items():
                shapes[f"layers.{layer}.{name}"] = shape
        shapes["norm.weight"] = (D,)
        if not self.tie_embeddings:
            shapes["output.weight"] = (V, D)
        return shapes

    def parameters(self) -> int:
        """All parameters, embedding and head included; where they are tied, once."""
        matrices = 1 if self.tie_embeddings else 2
        return self.non_embedding_parameters() + matrices * self.vocab_size * self.dim

    def multiplied_parameters(self) -> int:
        """Those that every token is multiplied by: all but the input embedding, a tied head's matrix being its head."""
        return self.non_embedding_parameters() + self.vocab_size * self.dim

    def non_embedding_parameters(self) -> int:
        """Parameters without the input embedding and the output head."""
        of_a_layer = sum(math.prod(shape) for shape in self.layer_tensors().values())
        last_norm = self.dim
        return self.n_layers * of_a_layer + last_norm


@dataclass(frozen=True)
class Train:
    # The batch.
    global_batch_tokens: int = key(
        values.tokens(), "tokens in one optimizer step, over all ranks"
    )
    batch_warmup: tuple[Phase, ...] = key(
        values.phases(),
        "smaller batches at the start of the stage, each for a while, then global_batch_tokens",
        (),
    )
    micro_batch: int = key(
        values.integer(),
        "sequences in one forward pass on one rank, at most; gradients accumulate over as many as a step needs",
        8,
        free=True,
    )
    # The learning rate over the stage.
    learning_rate: float = key(values.number(above=True), "peak learning rate")
    min_learning_rate: float = key(
        values.number(), "learning rate at the end of the horizon", 0.0
    )
    schedule: str = key(
        values.choice("cosine", "linear", "wsd"),
        "decay after the warm-up; wsd: constant, then linear",
        "cosine",
    )
    warmup: Duration = key(
        values.duration(),
        "linear warm-up at the start of the stage",
        Duration(0, "steps"),
    )
    horizon: Duration = key(
        values.duration(1, words=("stage",)),
        "length of the whole schedule, apart from the stage's own",
        "stage",
    )
    decay_fraction: float = key(
        values.number(0, 1, above=True),
        "wsd: the last part of the horizon that decays",
        0.1,
    )
    # AdamW.
    beta1: float = key(values.number(0, 1, below=True), "AdamW", 0.9)
    beta2: float = key(values.number(0, 1, below=True), "AdamW", 0.95)
    eps: float = key(values.number(above=True), "AdamW", 1e-8)
    weight_decay: float = key(values.number(), "AdamW, on all parameters", 0.1)
    max_grad_norm: float = key(
        values.number(above=True), "gradient norm is clipped to this", 1.0
    )
    # How the work is computed: all but the precision gives the same model to rounding.
    precision: str = key(
        values.choice("bf16", "fp32", "float8"),
        "of matrix products (weights and moments stay float32); float8: torchao's, by rows, all but the head's",
        "bf16",
    )
    optimizer: str = key(
        values.choice("fused", "foreach", "for-loop"),
        "AdamW implementation",
        "fused",
        free=True,
    )
    compile: bool = key(
        values.boolean(), "torch.compile each block and the loss", False, free=True
    )
    attention: str = key(
        values.choice("sdpa", "flash_attn", "flex"),
        'kernel: "sdpa" (torch: cuDNN, then flash); "flash_attn" (package flash-attn, GPU, bf16); "flex" (GPU)',
        "sdpa",
        free=True,
    )
    loss_chunk: int = key(
        values.integer(0),
        "tokens whose logits are in memory at once on a rank; 0: a whole micro-batch",
        0,
        free=True,
    )
    activation_checkpoint: str = key(
        values.choice("none", "selective", "full"),
        "recompute activations in the backward pass",
        "none",
        free=True,
    )
    cpu_offload: bool = key(
        values.boolean(),
        "keep sharded weights and moments in host memory",
        False,
        free=True,
    )
    deterministic: bool = key(
        values.boolean(), "only deterministic kernels; slower on GPUs", False, free=True
    )
    # What a bad step leads to. Free, so that a run that was stopped can go on without the batch; up to there it took
    # the updates that a run with "skip" takes. metrics.jsonl, whose hash each seal states, tells which were left out.
    on_nonfinite: str = key(
        values.choice("stop", "skip"),
        "at a NaN or infinite loss or gradient; skip: no update from it",
        "stop",
        free=True,
    )
    # Not free: "skip" gives other weights than "record", and another number of sigmas skips other batches.
    on_spike: str = key(
        values.choice("record", "stop", "skip"),
        "at a loss far above those before it; skip: no update",
        "record",
    )
    spike_sigmas: float = key(
        values.number(1),
        "a spike is this many standard deviations above the mean of 128 losses",
        6.0,
    )


@dataclass(frozen=True)
class Widths:
    """The widths of a model that growth can change; those that are not given stay."""

    dim: int = key(values.integer(2, MAX_WIDTH), "hidden width D", None)
    n_heads: int = key(values.integer(1, MAX_WIDTH), "attention heads", None)
    n_kv_heads: int = key(
        values.integer(1, MAX_WIDTH),
        "key/value heads; n_heads where [model] has as many",
        None,
    )
    ffn_dim: int = key(
        values.integer(1, 4 * MAX_WIDTH), "width F of the SwiGLU layer", None
    )
    norm_eps: float = key(values.number(0, 1, above=True), "epsilon of RMSNorm", None)


@dataclass(frozen=True)
class Parallel:
    replicate: int = key(
        values.integer(),
        "data parallel, weights replicated (DDP; with shard: HSDP)",
        1,
        free=True,
    )
    shard: int = key(
        values.integer(also=(-1,)),
        "data parallel, weights sharded (FSDP2); -1: all ranks left",
        -1,
        free=True,
    )
    tensor: int = key(
        values.integer(), "tensor parallel, with sequence parallel", 1, free=True
    )
    loss_parallel: bool = key(
        values.boolean(),
        "with tensor > 1: keep the logits sharded in the loss",
        True,
        free=True,
    )
    async_tensor: bool = key(
        values.boolean(),
        "with tensor > 1 and compile: overlap its communication",
        False,
        free=True,
    )
    reshard_after_forward: str = key(
        values.choice("default", "always", "never"),
        "when FSDP frees gathered weights",
        "default",
        free=True,
    )
    pipeline: int = key(values.integer(), "not supported: must be 1", 1, free=True)
    context: int = key(values.integer(), "not supported: must be 1", 1, free=True)


@dataclass(frozen=True)
class Base:
    """What differs from [model] in the model that training starts from."""

    n_layers: int | None = key(
        values.integer(1, 4096), "layers of the base model", None
    )
    model: dict[str, Any] = overrides(
        Widths, "widths of the base model that differ from [model]'s"
    )
    train: dict[str, Any] = overrides(
        Train, "keys of [train] that differ in the base stage"
    )
    parallel: dict[str, Any] = overrides(
        Parallel, "keys of [parallel] that differ in the base stage"
    )
    from_: str = key(
        values.path(),
        "start from these weights: a Hugging Face model folder, or a distributed checkpoint",
        "",
    )
    position: int = key(
        values.integer(0),
        "with from: sequences of this data that the base has consumed; the data go on after them",
        0,
    )


@dataclass(frozen=True)
class LossSlope:
    """A growth timing that is found during training, from the training loss."""

    loss_slope: float = key(
        values.number(above=True),
        "grow when the loss falls by less than this per billion tokens: a line fitted over the second half of the "
        "steps that the stage has at min, moving on",
    )
    min: Duration | Share = key(
        values.duration(1, share=True), "earliest growth, since the start of the run"
    )
    max: Duration | Share = key(
        values.duration(1, share=True), "latest growth, since the start of the run"
    )


@dataclass(frozen=True)
class Growth:
    """One growth of the model, and the stage that trains the grown model."""

    operator: str = key(
        values.operator(*OPERATORS),
        "what makes the grown weights: see the table of operators; or a function of your own, with --trust",
    )
    # When, and to how many layers.
    timing: Duration | Share | str | LossSlope = key(
        values.duration(words=("auto", "start"), share=True),
        'tokens since the start of the run at this growth, "0B": the base as it is initialised; "auto": guideline; '
        '"start": at once, with base.from; or a table, below',
        or_table=LossSlope,
    )
    factor: int | str | None = key(
        values.integer(2, also=("auto",)),
        'growth factor g: layers after / layers before; "auto": the paper\'s 4',
        None,
    )
    layer_map: tuple[int, ...] | None = key(
        values.layer_list(),
        "instead of factor: the source layer of each target layer",
        None,
    )
    order: str = key(
        values.choice("stack", "interleave"),
        "with factor: 0 1 0 1, or 0 0 1 1",
        "stack",
    )
    noise: float = key(
        values.number(0, 1),
        "share of random weights blended into all grown linears (paper, appendix I.2: 0.2)",
        0.0,
    )
    ramp: Duration | None = key(
        values.duration(1), 'with "random": how long the mask takes from 0 to 1', None
    )
    learn_steps: Duration | None = key(
        values.duration(1), 'with "learn": how long its maps are trained', None
    )
    maps: str = key(
        values.choice("paper", "official"),
        'with "learn": train the maps of what grows (eqs. 37-42), or, as the official code, those of widths and depth '
        "either way",
        "paper",
    )
    norm: str = key(
        values.choice("scaled", "copied"),
        'with "split": RMSNorm\'s weights times sqrt(d)/sqrt(D) (eq. 10), or as they are: preserves the function at '
        "whole factors (official code)",
        "scaled",
    )
    shares: str = key(
        values.choice("drawn", "rms"),
        'with "split": what the copies of an input weigh: parts of it, drawn, that add up to 1 (eqs. 4-11); or, as all '
        "inputs of a widened weight, one factor that keeps the RMS of its outputs (SPARKLING, eq. 17)",
        "drawn",
    )
    shrink_factor: float | None = key(
        values.number(0, 1, above=True),
        'with "shrink": what the old weights are multiplied by; its authors use 0.4',
        None,
    )
    perturbation: float | None = key(
        values.number(0, 100),
        'with "shrink": what the noise is multiplied by, which is a new model\'s initial weights: 1 for all of it',
        None,
    )
    # What of the training goes on over the growth.
    optimizer: str = key(
        values.choice("reset", "copy", "asymmetric"),
        "AdamW's moments: start afresh; grow by the same map as the weights; or only the first copy of each weight "
        "keeps its own",
        "reset",
    )
    lr: str | Rewarm = key(
        values.rewarm("restart", "continue"),
        "the schedule: begins anew; goes on where the stage before left it; or goes on so, from ratio times its rate",
        "restart",
    )
    lr_new: Rewarm | None = key(
        values.rewarm(highest=100),
        'beside lr = "continue", the rate of new parameters: from the schedule\'s it rises to ratio times that in '
        "rewarm_steps, then falls by a cosine of its own (SPARKLING, eq. 28), until the next growth",
        None,
    )
    freeze: Duration | None = key(
        values.duration(1),
        "how long only the new layers, the last norm and the head are trained (MSLT)",
        None,
    )
    learn: dict[str, Any] = overrides(
        Train,
        "with \"learn\": keys of [train] that differ while its maps are trained; unless given, LiGO's author's: rate "
        "7e-5 to 7e-6 over the stage, half of it warm-up, weight decay 0.1",
    )
    model: dict[str, Any] = overrides(
        Widths, "widths after this growth; the last growth leads to [model]"
    )
    train: dict[str, Any] = overrides(
        Train, "keys of [train] that differ in the stage after this growth"
    )
    parallel: dict[str, Any] = overrides(
        Parallel, "keys of [parallel] that differ in the stage after this growth"
    )


@dataclass(frozen=True)
class Guideline:
    """A fit of one's own for ``timing = "auto"``: log10(d) = a log10(N) + b / log10(C) + c."""

    a: float = key(
        values.number(-1e3, 1e3),
        "of log10 of N, the target's parameters without embedding and head",
    )
    b: float = key(
        values.number(-1e6, 1e6), "of 1 / log10 of the training FLOPs C = 6 N D"
    )
    c: float = key(values.number(-1e3, 1e3), "constant")
    source: str = key(values.text(), "what it was fitted on; shown in the plan")
    max_parameters: float | None = key(
        values.number(above=True), "largest N of the fit: the plan warns beyond", None
    )
    max_flops: float | None = key(
        values.number(above=True), "largest C of the fit: the plan warns beyond", None
    )


@dataclass(frozen=True)
class Validation:
    interval: Duration = key(
        values.duration(1),
        "between validations; also at the start and the end of every stage",
        Duration(500, "steps"),
        free=True,
    )
    sequences: int = key(
        values.integer(0), "held-out sequences per validation; 0: no validation", 64
    )
    take: str = key(
        values.choice("first", "spread"),
        "which ones: the first of the held-out text, or evenly spread over all of it, as text in folders needs",
        "first",
    )


@dataclass(frozen=True)
class Eval:
    """Benchmarks of the trained models, by lm-eval on the run's own ranks (the extra ``eval``)."""

    tasks: tuple[str, ...] = key(
        values.names(),
        'lm-eval\'s tasks; "paper": the eight of the paper; "paper_7b": these and the three more of its 7B; '
        '"paper_table_6", "paper_table_7": those of that table; []: none, as without [eval]',
        free=True,
    )
    after: str = key(
        values.choice("last", "each"),
        "at the end of the last train stage, or of each",
        "last",
        free=True,
    )
    interval: Duration | None = key(
        values.duration(1), "and between evaluations within a stage", None, free=True
    )
    batch: int = key(
        values.integer(), "sequences in one forward pass on one rank", 8, free=True
    )
    limit: int = key(
        values.integer(0), "examples of each task, for a try; 0: all", 0, free=True
    )
    include: str = key(
        values.path(),
        "folder with task files of your own; what they contain is run",
        "",
        free=True,
    )


@dataclass(frozen=True)
class Checkpoint:
    interval: Duration = key(
        values.duration(1), "between checkpoints", Duration(500, "steps"), free=True
    )
    keep: int = key(
        values.integer(1),
        "newest checkpoints kept; a stage's last is always kept",
        2,
        free=True,
    )
    async_mode: str = key(
        values.choice("disabled", "async", "async_with_pinned_mem"),
        "save while training goes on",
        "disabled",
        free=True,
    )
    verify: str = key(
        values.choice("whole", "sampled"),
        "before loading: SHA-256 of every file, or of one per rank; sizes, and the loaded weights, always",
        "whole",
        free=True,
    )


@dataclass(frozen=True)
class Log:
    interval: Duration = key(
        values.duration(1), "between logged steps", Duration(10, "steps"), free=True
    )
    tensorboard: bool = key(
        values.boolean(), "write TensorBoard files", True, free=True
    )
    wandb: bool = key(
        values.boolean(),
        "send the same to Weights & Biases (package wandb; WANDB_PROJECT etc. apply)",
        False,
        free=True,
    )


@dataclass(frozen=True)
class Run:
    folder: str = key(values.path(), 'run folder; default "runs/<name>"', "", free=True)
    init_timeout: int = key(
        values.integer(),
        "seconds for a collective up to a stage's first step",
        300,
        free=True,
    )
    train_timeout: int = key(
        values.integer(), "seconds for a collective after it", 100, free=True
    )
    on_event: str = key(
        values.text(),
        "on the command line only, --set run.on_event=./notify.sh: a shell command that is started at a stall, spike, "
        "stop, growth and the end, with STACKGROW_EVENT, STACKGROW_MESSAGE and STACKGROW_RUN in its environment",
        "",
        free=True,
        typed_only=True,
    )
    stall_seconds: int = key(
        values.integer(),
        "with on_event: a stall is this long without a step or another sign of life",
        600,
        free=True,
    )
    accept_versions: bool = key(
        values.boolean(),
        "go on under another minor version of torch or torchtitan",
        False,
        free=True,
    )


@dataclass(frozen=True)
class Recipe:
    """One TOML file, checked: everything that defines a run. Values are parsed; amounts are in tokens."""

    name: str = key(values.name(), "names the run and its folder", free=True)
    seed: int = key(
        values.integer(0, 2**32 - 1), "of initialization, data order and growth"
    )
    budget: Budget = table(Budget, "how much is trained", required=True)
    data: Data = table(Data, "what is trained on", required=True)
    model: Model = table(Model, "the target: what the last stage trains", required=True)
    base: Base | None = table(
        Base, "what differs from [model] in the base model", optional=True
    )
    growth: tuple[Growth, ...] = table(
        Growth, "growths in order of their timing", many=True
    )
    guideline: Guideline | None = table(
        Guideline,
        'instead of the paper\'s guideline for timing = "auto": log10(d) = a log10(N) + b / log10(C) + c',
        optional=True,
    )
    train: Train = table(Train, "every stage", required=True)
    parallel: Parallel = table(Parallel, "how the ranks share the work")
    validation: Validation = table(Validation, "loss on held-out documents")
    eval: Eval | None = table(Eval, "benchmarks", optional=True)
    checkpoint: Checkpoint = table(Checkpoint, "what is kept on disk")
    log: Log = table(Log, "what is written down")
    run: Run = table(Run, "where and how it runs")

    @property
    def folder(self) -> str:
        return self.run.folder or f"runs/{self.name}"
