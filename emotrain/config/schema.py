"""Every setting of a run, as frozen dataclasses with a docstring under each field.

The type of a field says what the setting may be (`kinds`).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from emotrain.config.data import DataConfig
from emotrain.config.evaluation import EvaluationConfig
from emotrain.config.finetune import FinetuneConfig
from emotrain.config.kinds import Counts, NonNegativeFloat, NonNegativeInt, PathText
from emotrain.config.losses import LossConfig
from emotrain.config.profile import ProfileConfig


@dataclass(frozen=True)
class PoolConfig:
    """The document pool: the experts that the tokens of one document may choose from (spec 2.3)."""

    kind: Literal["none", "fixed", "uniform"] = "uniform"
    """`uniform`: a size drawn from U{min..max}; `fixed`: always `size`; `none`: no pool (a
    standard MoE)."""
    min: int = 8
    """Smallest pool drawn by `uniform`, in routed experts."""
    max: NonNegativeInt = 0
    """Largest pool drawn by `uniform`, in routed experts; 0 means all routed experts of a layer (of
    the largest layer, where layers differ). Exclusive experts come on top of a pool's size."""
    size: int = 32
    """Pool size of `fixed`, in routed experts."""
    per: Literal["layer", "document"] = "layer"
    """`layer`: each layer draws its own size for a document; `document`: one size for all
    layers."""
    allow_larger: bool = False
    """Whether pools may be larger than the routed experts of a layer. Such a pool restricts
    nothing. The published models drew 8 to 128 of 127; elsewhere a larger pool is a mistake and is
    refused."""
    unit: str = "document"
    """What has a pool: a `document`, or `segment:N`, each N tokens of one. The published models
    have a pool a document. A pool's size is its document's either way."""
    chosen_by: str = "document"
    """Which tokens choose the pool of a unit: all of it (`document`, the published rule), its
    first N tokens (`prefix:N`), or `other_part`: each half of it gets the pool that the other half
    chooses."""
    across_windows: int = 1
    """Neighbouring windows of a step in which a document keeps one pool; those windows lie in one
    micro-batch. 1: a document that is cut has a pool in each window, as in the published models."""
    none_share: NonNegativeFloat = 0.0
    """Share of documents that get no pool and may use all experts, drawn anew in every step."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the share of documents with a pool rises from none to what it stays."""
    scores: Literal["masked", "unmasked"] = "masked"
    """What routing weights, load balance and the router z-loss read: probabilities inside of the
    pool (`masked`, as the published models), or those over all experts (`unmasked`), of which the
    pool then only says which may be chosen."""


@dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts."""

    gating: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` over the routed experts, or `sigmoid` of each logit (plus 1e-7, as the
    reference)."""
    normalize_weights: bool = False
    """Whether the weights of a token's routed experts are divided by their sum. The published
    models do not."""
    shared_weight: Literal["one", "softmax"] = "one"
    """Weight of shared experts: `one` each (training), or `softmax` over their own logits (the
    published Hugging Face code; the same thing for one shared expert)."""
    choice_bias: bool = False
    """Whether a router has a bias for each expert, which is added to its probability where experts
    are chosen, and nowhere else. `losses.balance_method=bias` gives routers one and moves it; it
    stays as it is otherwise."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """The document pool."""


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of each layer: N routed ones, of which a token uses K, and M shared ones. The
    published names count differently: their 128 experts, 8 a token, are 127 routed ones, 7 a token,
    and 1 shared one."""

    routed: NonNegativeInt = 127
    """N: experts of a layer that tokens choose from. With 0 (and `top_k` 0) the model is dense."""
    shared: NonNegativeInt = 1
    """M: experts of a layer that every token uses, besides the routed ones."""
    top_k: NonNegativeInt = 7
    """K: routed experts that a token uses."""
    hidden: int = 1024
    """Hidden width of one expert."""
    routed_per_layer: tuple[int, ...] = ()
    """Routed experts of each layer where layers differ (a pruned model); empty means `routed`
    everywhere."""
    sharing: Literal["none", "groups", "all"] = "none"
    """Which layers share a bank of routed experts: `none`, each layer has its own; `groups` of
    `layers_per_bank` neighbouring layers; `all` layers (UniPool, arXiv 2605.06665). A router,
    and shared experts, stay a layer's own; load is balanced over a bank's layers together."""
    layers_per_bank: int = 2
    """Layers of a bank under `sharing=groups`; it divides `model.num_layers`."""
    exclusive: Counts = ()
    """Exclusive experts: `{rust: 2}` makes the last 2 of the `routed` experts of every layer those
    of the domain `rust`. They are in the pool of each of its documents and in no other one's, and
    are left out of the load balance. `emotrain experts` adds and removes them."""
    backend: Literal["auto", "torch", "triton", "megablocks"] = "auto"
    """Kernels of routing and experts: `torch`, `triton`, `megablocks` (its grouped GEMM, experts
    alone), or `auto`, the best one for the device."""

    @property
    def num_exclusive(self) -> int:
        """Exclusive experts of a layer, of all domains."""
        return sum(count for _, count in self.exclusive)


@dataclass(frozen=True)
class AttentionConfig:
    """Self-attention."""

    document_mask: bool = True
    """Whether a token sees only its own document. On for every kind of model, so that
    comparisons are fair."""


@dataclass(frozen=True)
class ModelConfig:
    """The transformer of spec 1.2."""

    vocab_size: int = 100352
    """Rows of the embedding and of the output head."""
    d_model: int = 2048
    """Width of the residual stream."""
    num_layers: int = 16
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads."""
    num_kv_heads: NonNegativeInt = 0
    """Key and value heads; 0 means as many as `num_heads`."""
    rope_theta: float = 500000.0
    """Base of the rotary position frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of every matrix at the start; a normal cut at three deviations."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Self-attention."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """The expert banks."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """The router."""

    def routed_in_layer(self, layer: int) -> int:
        """N: routed experts of a layer."""
        of_layer = self.experts.routed_per_layer
        return of_layer[layer] if of_layer else self.experts.routed

    def common_in_layer(self, layer: int) -> int:
        """Routed experts of a layer that documents of every domain may use: the first ones."""
        return self.routed_in_layer(layer) - self.experts.num_exclusive

    def experts_in_layer(self, layer: int) -> int:
        """E = N + M: routed and shared experts of a layer."""
        return self.routed_in_layer(layer) + self.experts.shared

    def chosen_in_layer(self, layer: int) -> int:
        """K: routed experts that a token uses; all of them in a layer that was pruned to fewer than
        `top_k`."""
        return min(self.experts.top_k, self.routed_in_layer(layer))

    def bank_of_layer(self, layer: int) -> int:
        """The bank of routed experts that a layer uses: banks are numbered in the order of the
        layers, and layers of one bank share their experts."""
        sharing, size = self.experts.sharing, self.experts.layers_per_bank
        return {"none": layer, "groups": layer // size, "all": 0}[sharing]

    @cached_property
    def pool(self) -> PoolConfig:
        """The document pool as it is drawn: `max` is a number of experts, also where the setting
        is 0, and a dense model has no pool."""
        pool = self.router.pool
        most = max(map(self.common_in_layer, range(self.num_layers)))
        return replace(pool, max=pool.max or most) if most else replace(pool, kind="none")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (spec 5)."""

    lr: NonNegativeFloat = 4e-3
    """Peak learning rate."""
    beta1: NonNegativeFloat = 0.9
    """Decay of the first moment."""
    beta2: NonNegativeFloat = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of every parameter but the input embedding."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """`cosine`: warm-up, then cosine to `final_ratio`; `linear`: warm-up, then linear to
    `final_ratio`."""
    warmup_steps: NonNegativeInt = 2000
    """Steps of linear warm-up."""
    warmup_share: NonNegativeFloat = 0.0
    """Linear warm-up as a share of the run's steps, instead of `warmup_steps`; 0 means those."""
    final_ratio: NonNegativeFloat = 0.1
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class AnnealConfig:
    """Anneal a trained model: its optimizer state and data order go on, the learning rate falls
    linearly to zero from where it stood (spec 5.1)."""

    checkpoint: PathText = ""
    """Checkpoint folder to start from; empty means no annealing."""
    tokens: NonNegativeInt = 0
    """Tokens of the anneal; whole steps, rounded down as the reference does."""


@dataclass(frozen=True)
class TrainingConfig:
    """The run."""

    run_dir: PathText = ""
    """Folder of checkpoints, metrics and the resolved configuration."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights, the data order and the pool sizes."""
    steps: NonNegativeInt = 0
    """Optimizer steps; 0 means as many as `tokens` needs."""
    tokens: NonNegativeInt = 0
    """Tokens to train on; the steps are rounded up. Used when `steps` is 0."""
    global_batch: int = 1024
    """Sequences of one optimizer step, over all ranks."""
    micro_batch: int = 4
    """Sequences of one forward pass on one rank."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`float32`, `bfloat16` (autocast; fp32 parameters and optimizer), or `auto`: bfloat16 on a
    GPU, float32 on a CPU, where it is the faster one without AMX."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`cpu`, `cuda`, or `auto`."""
    compile: bool = False
    """Whether blocks run through torch.compile."""
    deterministic: bool = False
    """Whether two runs on a GPU agree to the bit, and one that was interrupted with one that was
    not: attention's backward, above all, then adds in a fixed order, which takes longer. On a CPU
    they always do."""
    resume: PathText = "auto"
    """`auto`: go on from the newest whole checkpoint in `run_dir`, if any; `never`: refuse a folder
    with checkpoints; or the path of a checkpoint where the run begins: once the run has written
    checkpoints of its own since, it goes on from the newest of those. Going back to a checkpoint
    of `run_dir` itself sets the later ones aside."""
    checkpoint_every: NonNegativeInt = 1000
    """Steps between checkpoints; 0 means only at the end and on SIGTERM or SIGINT."""
    keep_checkpoints: NonNegativeInt = 2
    """How many of the newest checkpoints to keep; 0 keeps all. Old ones go only after a newer
    one is whole."""
    permanent_every: NonNegativeInt = 0
    """Checkpoints of a multiple of this many steps are never removed; 0: none are kept for good."""
    async_checkpoints: bool = True
    """Whether training goes on while a checkpoint is written (from a copy in host memory)."""
    on_checkpoint_error: Literal["stop", "warn"] = "stop"
    """What a checkpoint that cannot be written (disk full, folder not writable) does to the run:
    `stop`, or `warn`: say so and go on to the next one. The last whole checkpoint stays either
    way."""
    log_every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Whether metrics also go to TensorBoard files, where the package is installed."""
    tracker: Literal["none", "trackio", "wandb"] = "none"
    """Package that metrics also go to: `trackio` keeps them on this machine; `wandb`, or none."""
    max_skipped_steps: int = 10
    """Abort after this many updates in a row were skipped for a loss or gradient that is not
    finite."""
    collective_timeout_s: float = 600.0
    """Seconds after which a collective that does not end stops the run, naming rank, step and
    collective."""
    peak_tflops: NonNegativeFloat = 0.0
    """Peak of one device in TFLOP/s, for MFU; 0 means the known value of the device, or none."""

    def uses_bfloat16(self, device_type: str) -> bool:
        """Whether `precision` means autocast to bfloat16 on a device of this type."""
        return self.precision == "bfloat16" or (self.precision == "auto" and device_type == "cuda")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share the model. Every process has its own data; processes =
    replicate * shard, and shard = ep * expert_dp. The layout does not change the result."""

    replicate: int = 1
    """Copies of the model (HSDP). Each is spread over `shard` processes; copies sum their
    gradients."""
    shard: NonNegativeInt = 0
    """Processes that one copy of parameters, gradients and optimizer state is spread over (FSDP2);
    0 means all that `replicate` leaves."""
    ep: int = 1
    """Processes that the routed experts of a layer are spread over (expert parallelism), folded out
    of `shard`. Neighbouring ranks: at most the GPUs of a node keeps the exchange of tokens on
    NVLink."""
    placement: PathText = "contiguous"
    """Which experts share a rank under `ep`: `contiguous`, neighbours in number; a FILE of
    `emotrain placement`; or `auto`: at every multiple of `training.checkpoint_every` steps,
    experts that tokens choose together move to one rank where that pays. The result of training
    is the same; fewer rows travel."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again to save memory: `none`, `selective` (the inside of the experts,
    where most of it is), or `full` (whole blocks). Routing decisions are never made twice."""
    reshard_after_forward: bool = True
    """Whether parameters are gathered again in backward. False keeps them gathered after forward:
    more memory, less communication."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In what gradients are summed over processes. `bf16` sends half the bytes and rounds every
    partial sum to 8 bits; under `replicate`, also what micro-batches add up before copies sum."""


@dataclass(frozen=True)
class Config:
    """A run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    losses: LossConfig = field(default_factory=LossConfig)
    """Loss terms."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, batch, checkpoints, logging."""
    anneal: AnnealConfig = field(default_factory=AnnealConfig)
    """Annealing from a checkpoint."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Tuning of a trained model."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation while training."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the model."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profiling."""

    def __post_init__(self) -> None:
        if self.losses.balance_method == "bias" and not self.model.router.choice_bias:
            # A bias is a part of the model, which whoever reads a checkpoint builds without losses.
            router = replace(self.model.router, choice_bias=True)
            object.__setattr__(self, "model", replace(self.model, router=router))

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch * self.data.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run; for an anneal, those of the anneal alone."""
        if self.anneal.checkpoint or (self.anneal.tokens and not self.training.steps):
            return self.anneal.tokens // self.tokens_per_step
        return self.training.steps or math.ceil(self.training.tokens / self.tokens_per_step)


def flatten(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """All leaf settings as (dotted key, value), in order of definition."""
    leaves = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        key = f"{prefix}{item.name}"
        leaves += flatten(value, f"{key}.") if dataclasses.is_dataclass(value) else [(key, value)]
    return leaves


def setting_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """The type of every leaf setting, by its dotted key, in order of definition."""
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        key = f"{prefix}{name}"
        is_group = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        types |= setting_types(kind, f"{key}.") if is_group else {key: kind}
    return types
