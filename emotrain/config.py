"""Every setting of a run, as frozen dataclasses with a docstring under each field.

Precedence, lowest first: the defaults below < the files named by `base:` < the configuration file <
`key=value` on the command line. `configs/quickstart.yaml` with `optimizer.lr=1e-3` trains the
quickstart with that learning rate. An unknown setting, a value of the wrong type and a combination
that cannot work are refused before anything starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emotrain.errors import MissingFileError, UserError


@dataclass(frozen=True)
class PoolConfig:
    """The document pool: the experts that the tokens of one document may choose from (spec 2.3)."""

    kind: str = "uniform"
    """`uniform`: a size drawn from U{min..max}; `fixed`: always `size`; `none`: no pool (a
    standard MoE)."""
    min: int = 8
    """Smallest pool drawn by `uniform`, in routed experts."""
    max: int = 128
    """Largest pool drawn by `uniform`. A size of all routed experts or more means no
    restriction."""
    size: int = 32
    """Pool size of `fixed`, in routed experts."""
    per: str = "layer"
    """`layer`: each layer draws its own size for a document; `document`: one size for all
    layers."""


@dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts."""

    gating: str = "softmax"
    """`softmax` over the routed experts, or `sigmoid` of each logit (plus 1e-7, as the
    reference)."""
    normalize_weights: bool = False
    """Whether the weights of a token's routed experts are divided by their sum. The published
    models do not."""
    shared_weight: str = "one"
    """Weight of shared experts: `one` each (training), or `softmax` over their own logits (the
    published Hugging Face code; the same thing for one shared expert)."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """The document pool."""


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts of each layer. Counts include the shared experts, as in the published names."""

    count: int = 128
    """Experts of a layer, routed and shared. With `count` equal to `shared` the model is dense."""
    shared: int = 1
    """Experts that every token uses; the last ones of the bank."""
    per_token: int = 8
    """Experts a token uses, the shared ones included."""
    hidden: int = 1024
    """Hidden width of one expert."""
    count_per_layer: tuple[int, ...] = ()
    """Experts of each layer where layers differ (a pruned model); empty means `count`
    everywhere."""
    sharing: str = "none"
    """Which layers share a bank of routed experts: `none`, each layer has its own; `groups` of
    `layers_per_bank` neighbouring layers; `all` layers (UniPool, arXiv 2605.06665). A router,
    and shared experts, stay a layer's own; load is balanced over a bank's layers together."""
    layers_per_bank: int = 2
    """Layers of a bank under `sharing=groups`; it divides `model.num_layers`."""
    backend: str = "auto"
    """Kernels of routing and experts: `torch`, `triton`, `megablocks` (its grouped GEMM, experts
    alone), or `auto`, the best one for the device."""


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
    num_kv_heads: int = 0
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

    def experts_in_layer(self, layer: int) -> int:
        return (
            self.experts.count_per_layer[layer]
            if self.experts.count_per_layer
            else self.experts.count
        )

    def routed_in_layer(self, layer: int) -> int:
        return self.experts_in_layer(layer) - self.experts.shared

    def chosen_in_layer(self, layer: int) -> int:
        """Routed experts that a token uses; all of them in a layer that was pruned to fewer than
        `per_token` asks for."""
        return min(self.experts.per_token - self.experts.shared, self.routed_in_layer(layer))

    def bank_of_layer(self, layer: int) -> int:
        """The bank of routed experts that a layer uses: banks are numbered in the order of the
        layers, and layers of one bank share their experts."""
        sharing, size = self.experts.sharing, self.experts.layers_per_bank
        return {"none": layer, "groups": layer // size, "all": 0}[sharing]

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


@dataclass(frozen=True)
class LossConfig:
    """Loss terms. Router terms are averaged over layers."""

    balance: float = 0.1
    """Weight of the load-balance loss (spec 2.6)."""
    balance_scope: str = "global_batch"
    """Tokens over which expert load is balanced: `global_batch` (every document of the optimizer
    step), `data_parallel` (one micro-batch across ranks, as the reference), or `micro_batch`."""
    balance_schedule: str = "joint"
    """How `global_batch` treats several micro-batches a step. `joint`: forward all, then backward
    all (exact; keeps the activations of every micro-batch). `running`: counts of the step so far
    (approximate, no extra memory)."""
    router_z: float = 0.001
    """Weight of the router z-loss (spec 2.7)."""
    router_z_logits: str = "pool"
    """Logits under the router z-loss: those of the document's `pool`, or `all` routed experts."""
    z: float = 1e-5
    """Weight of the z-loss on the language-model logits."""


@dataclass(frozen=True)
class RepetitionFilterConfig:
    """Sequences with long periodic repetitions get no loss (spec 4.4); they still pass through
    the model."""

    enabled: bool = False
    """Whether to filter."""
    min_period: int = 1
    """Shortest period looked for, in tokens."""
    max_period: int = 13
    """Longest period looked for, in tokens."""
    max_count: int = 32
    """A sequence is filtered when a period repeats at least this often."""


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: str = ""
    """Folder written by `emotrain prepare`."""
    sequence_length: int = 4096
    """Tokens of one packed sequence."""
    cross_document_targets: bool = True
    """Whether the last token of a document is trained to predict the first of the next one in its
    sequence, as the reference does (spec 4.3)."""
    verify_checksums: bool = True
    """Whether what is read is hashed: in training the 64 KiB blocks around each sequence; in
    evaluation, and for data sets prepared without checksums of blocks, whole shards (a second or
    two a gigabyte)."""
    repetition_filter: RepetitionFilterConfig = field(default_factory=RepetitionFilterConfig)
    """Filter of periodic sequences."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (spec 5)."""

    lr: float = 4e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of every parameter but the input embedding."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: str = "cosine"
    """`cosine`: warm-up, then cosine to `final_ratio`; `linear`: warm-up, then linear to
    `final_ratio`."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    final_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class AnnealConfig:
    """Anneal a trained model: its optimizer state and data order go on, the learning rate falls
    linearly to zero from where it stood (spec 5.1)."""

    checkpoint: str = ""
    """Checkpoint folder to start from; empty means no annealing."""
    tokens: int = 0
    """Tokens of the anneal; whole steps, rounded down as the reference does."""


@dataclass(frozen=True)
class TrainingConfig:
    """The run."""

    run_dir: str = ""
    """Folder of checkpoints, metrics and the resolved configuration."""
    seed: int = 0
    """Seed of the initial weights, the data order and the pool sizes."""
    steps: int = 0
    """Optimizer steps; 0 means as many as `tokens` needs."""
    tokens: int = 0
    """Tokens to train on; the steps are rounded up. Used when `steps` is 0."""
    global_batch: int = 1024
    """Sequences of one optimizer step, over all ranks."""
    micro_batch: int = 4
    """Sequences of one forward pass on one rank."""
    precision: str = "auto"
    """`float32`, `bfloat16` (autocast; fp32 parameters and optimizer), or `auto`: bfloat16 on a
    GPU, float32 on a CPU, where it is the faster one without AMX."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`."""
    compile: bool = False
    """Whether blocks run through torch.compile."""
    resume: str = "auto"
    """`auto`: go on from the newest whole checkpoint in `run_dir`, if any; `never`: refuse a folder
    with checkpoints; or the path of a checkpoint."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; 0 means only at the end and on SIGTERM or SIGINT."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep; 0 keeps all. Old ones go only after a newer
    one is whole."""
    async_checkpoints: bool = True
    """Whether training goes on while a checkpoint is written (from a copy in host memory)."""
    on_checkpoint_error: str = "stop"
    """What a checkpoint that cannot be written (disk full, folder not writable) does to the run:
    `stop`, or `warn`: say so and go on to the next one. The last whole checkpoint stays either
    way."""
    log_every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Whether metrics also go to TensorBoard files, where the package is installed."""
    max_skipped_steps: int = 10
    """Abort after this many updates in a row were skipped for a loss or gradient that is not
    finite."""
    collective_timeout_s: float = 600.0
    """Seconds after which a collective that does not end stops the run, naming rank, step and
    collective."""
    peak_tflops: float = 0.0
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
    shard: int = 0
    """Processes that one copy of parameters, gradients and optimizer state is spread over (FSDP2);
    0 means all that `replicate` leaves."""
    ep: int = 1
    """Processes that the routed experts of a layer are spread over (expert parallelism), folded out
    of `shard`. Neighbouring ranks: at most the GPUs of a node keeps the exchange of tokens on
    NVLink."""
    recompute: str = "none"
    """What backward computes again to save memory: `none`, `selective` (the inside of the experts,
    where most of it is), or `full` (whole blocks). Routing decisions are never made twice."""
    reshard_after_forward: bool = True
    """Whether parameters are gathered again in backward. False keeps them gathered after forward:
    more memory, less communication."""


@dataclass(frozen=True)
class ProfileConfig:
    """A profile of a few steps: a Chrome trace of each rank and a table of the step's parts, in
    RUN_DIR/profile."""

    start: int = 0
    """First step profiled; 0 means no profile."""
    steps: int = 3
    """Steps profiled."""


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How processes share the model."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Profiling."""

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch * self.data.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run; for an anneal, those of the anneal alone."""
        if self.anneal.checkpoint or (self.anneal.tokens and not self.training.steps):
            return self.anneal.tokens // self.tokens_per_step
        return self.training.steps or math.ceil(self.training.tokens / self.tokens_per_step)


CHOICES = {
    "model.router.gating": ("softmax", "sigmoid"),
    "model.router.shared_weight": ("one", "softmax"),
    "model.router.pool.kind": ("none", "fixed", "uniform"),
    "model.router.pool.per": ("layer", "document"),
    "model.experts.sharing": ("none", "groups", "all"),
    "model.experts.backend": ("auto", "torch", "triton", "megablocks"),
    "losses.balance_scope": ("global_batch", "data_parallel", "micro_batch"),
    "losses.balance_schedule": ("joint", "running"),
    "losses.router_z_logits": ("pool", "all"),
    "optimizer.schedule": ("cosine", "linear"),
    "training.precision": ("auto", "float32", "bfloat16"),
    "training.device": ("auto", "cpu", "cuda"),
    "training.on_checkpoint_error": ("stop", "warn"),
    "parallel.recompute": ("none", "selective", "full"),
}
"""Settings that take one of a few words."""

MAY_BE_ZERO = {
    "model.experts.shared",
    "model.num_kv_heads",
    "losses.balance",
    "losses.router_z",
    "losses.z",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.warmup_steps",
    "optimizer.final_ratio",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.lr",
    "anneal.tokens",
    "training.seed",
    "training.steps",
    "training.tokens",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.peak_tflops",
    "parallel.shard",
    "profile.start",
}
"""Numbers that may be zero; every other number must be positive, and none may be negative."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files its `base:` names, and `key=value` overrides, and check the
    result.

    Raises:
        ValueError: an unknown setting (names the nearest known one), a wrong type, a value out of
            range or a combination that cannot work. FileNotFoundError: no such file.
    """
    settings = _read_yaml_chain(Path(path), ())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{override!r} is not a setting; write key=value, for example optimizer.lr=1e-3"
            )
        _set(settings, key.strip(), _parse_scalar(key, value))
    return config_from_dict(settings)


def config_from_dict(settings: dict[str, Any]) -> Config:
    """Build and check a Config from nested dictionaries; see `load_config` for errors."""
    config = _build(Config, settings, "")
    check(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries, the inverse of `config_from_dict`."""
    return dataclasses.asdict(config)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back to the same value."""
    from omegaconf import OmegaConf

    settings = config_to_dict(config)
    settings["model"]["experts"]["count_per_layer"] = list(config.model.experts.count_per_layer)
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(settings)), encoding="utf-8")


def check(config: Config) -> None:
    """Refuse values out of range and combinations that cannot work: one line with the value, the
    rule and the fix."""
    for key, value in flatten(config):
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key}={value} is not known; choose one of {', '.join(CHOICES[key])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key}={value} is not finite; give a finite number")
            if value < 0 or (value == 0 and key not in MAY_BE_ZERO):
                raise UserError(
                    f"{key}={value} must be {'at least 0' if key in MAY_BE_ZERO else 'positive'}"
                )
    model, experts, pool = config.model, config.model.experts, config.model.router.pool
    _require(
        model.d_model % model.num_heads == 0,
        f"model.d_model={model.d_model} is not a multiple of "
        f"model.num_heads={model.num_heads}; change one of them",
    )
    _require(
        model.head_dim % 2 == 0,
        f"attention heads are {model.head_dim} wide (d_model / num_heads); rotary positions "
        f"need an even width, change model.num_heads",
    )
    _require(
        model.num_heads % model.kv_heads == 0,
        f"model.num_heads={model.num_heads} is not a multiple of "
        f"model.num_kv_heads={model.kv_heads}; change one of them",
    )
    _require(
        len(experts.count_per_layer) in (0, model.num_layers),
        f"model.experts.count_per_layer has "
        f"{len(experts.count_per_layer)} entries for {model.num_layers} layers; give one a layer, "
        f"or none",
    )
    _require(
        experts.shared <= experts.per_token,
        f"model.experts.per_token={experts.per_token} counts the shared experts; "
        f"make it at least model.experts.shared={experts.shared}",
    )
    _require(
        experts.sharing != "groups" or model.num_layers % experts.layers_per_bank == 0,
        f"model.experts.layers_per_bank={experts.layers_per_bank} does not divide "
        f"model.num_layers={model.num_layers}; choose a divisor",
    )
    _require(
        experts.sharing == "none" or len(set(experts.count_per_layer)) <= 1,
        f"model.experts.sharing={experts.sharing} needs as many experts in every layer; give "
        f"model.experts.count_per_layer equal entries or none",
    )
    for layer in range(model.num_layers):
        routed, chosen = model.routed_in_layer(layer), experts.per_token - experts.shared
        _require(
            routed >= 0,
            f"layer {layer} has {model.experts_in_layer(layer)} experts, fewer than "
            f"model.experts.shared={experts.shared}; raise model.experts.count",
        )
        _require(
            chosen <= routed or bool(experts.count_per_layer),
            f"model.experts.per_token={experts.per_token} needs {chosen} routed "
            f"experts, layer {layer} has {routed}; raise model.experts.count or lower per_token",
        )
        _require(
            (chosen == 0) == (routed == 0),
            f"layer {layer} has {routed} routed experts and tokens choose {chosen or 'none'} of "
            f"them; "
            f"only a dense model, whose experts are all shared, has none",
        )
    _require(
        pool.min <= pool.max,
        f"model.router.pool.min={pool.min} is above model.router.pool.max={pool.max}; swap them",
    )
    _require(
        config.data.sequence_length >= 2,
        "data.sequence_length=1 leaves nothing to predict; make it at least 2",
    )
    filter_ = config.data.repetition_filter
    _require(
        filter_.min_period <= filter_.max_period,
        f"data.repetition_filter.min_period={filter_.min_period} is above "
        f"max_period={filter_.max_period}; swap them",
    )
    _require(
        config.optimizer.beta1 < 1 and config.optimizer.beta2 < 1,
        f"optimizer.beta1={config.optimizer.beta1}, beta2={config.optimizer.beta2} must be below 1",
    )
    _require(
        config.training.global_batch % config.training.micro_batch == 0,
        f"training.global_batch={config.training.global_batch} is not a multiple of "
        f"training.micro_batch={config.training.micro_batch}; change one of them",
    )
    if config.anneal.checkpoint:
        _require(
            config.num_steps > 0,
            f"anneal.tokens={config.anneal.tokens} is less than one step of "
            f"{config.tokens_per_step} tokens; raise it",
        )


def flatten(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """All leaf settings as (dotted key, value), in order of definition."""
    leaves = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        key = f"{prefix}{item.name}"
        leaves += flatten(value, f"{key}.") if dataclasses.is_dataclass(value) else [(key, value)]
    return leaves


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _read_yaml_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's settings over those of the file its `base:` names (relative to the file
    itself)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: its base files lead back to it; break the circle")
    if not path.is_file():
        raise MissingFileError(
            f"{path}: no such configuration file; `ls configs` shows those that come with the "
            f"project"
        )
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must hold `key: value` settings, not a {type(settings).__name__}")
    base = settings.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise UserError(f"{path}: base={base!r} must be the name of one file")
    merged = _read_yaml_chain(path.parent / base, (*seen, path))
    _merge(merged, settings)
    return merged


def _merge(into: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _set(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        child = settings.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{dotted}: {parent} is a value, not a group of settings")
        settings = child
    settings[leaf] = value


def _parse_scalar(key: str, text: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}={text} is not readable: {' '.join(str(error).split())}") from None


def _build(cls: type, settings: Any, prefix: str) -> Any:
    """An instance of a settings class from a dictionary, refusing unknown keys and wrong types."""
    if not isinstance(settings, dict):
        raise UserError(
            f"{prefix.rstrip('.')}={settings!r} is a group of settings; give it as `name: value` "
            f"lines"
        )
    known = {item.name: item for item in dataclasses.fields(cls)}
    for name in settings:
        if name not in known:
            raise UserError(_unknown(f"{prefix}{name}"))
    types = typing.get_type_hints(cls)
    values = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(types[name]):
            values[name] = _build(types[name], value, f"{prefix}{name}.")
        else:
            values[name] = _coerce(f"{prefix}{name}", value, types[name])
    return cls(**values)


def _unknown(key: str) -> str:
    known = {name for name, _ in flatten(Config())}
    known |= {name[:dot] for name in known for dot, letter in enumerate(name) if letter == "."}
    nearest = max(sorted(known), key=lambda name: _likeness(key, name))
    hint = (
        f"did you mean {nearest}?"
        if _likeness(key, nearest) >= 0.6
        else "`emotrain settings` lists them all"
    )
    return f"{key} is not a setting; {hint}"


def _likeness(wanted: str, known: str) -> float:
    """How well a known setting answers a wanted one: by its last word, and more so in the same
    section."""
    (section, _, leaf), (known_section, _, known_leaf) = (
        wanted.rpartition("."),
        known.rpartition("."),
    )
    words, known_words = leaf.split("_"), known_leaf.split("_")
    alike = difflib.SequenceMatcher(None, leaf, known_leaf).ratio()
    if len(words) > 1 and known_leaf == "".join(word[:1] for word in words):  # learning_rate, lr
        alike = 0.9
    if common := max(
        (len(word) for word in words if word in known_words), default=0
    ):  # batch_size, global_batch
        alike = max(alike, 0.6 + 0.01 * common)
    return alike + 0.2 * (section == known_section) if alike >= 0.6 else 0.0


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """`value` as the type of its field. Whole floats pass as integers, so that `tokens: 130e9`
    can be written."""
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        kind is int
        and is_number
        and (isinstance(value, int) or value.is_integer())
        and abs(value) < 2**63
    ):
        return int(value)
    if (
        kind is float
        and is_number
        and not (isinstance(value, int) and abs(value) > sys.float_info.max)
    ):
        return float(value)
    if (
        kind == tuple[int, ...]
        and isinstance(value, (list, tuple))
        and all(type(v) is int and v > 0 for v in value)
    ):
        return tuple(value)
    names = {
        bool: "true or false",
        str: "text",
        int: "a whole number below 2^63",
        float: "a number",
        tuple[int, ...]: "a list of positive whole numbers",
    }
    raise UserError(f"{key}={value!r} must be {names[kind]}")
