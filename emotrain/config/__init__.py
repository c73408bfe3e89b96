"""Every setting of a run: the dataclasses (`schema`), what is refused (`rules`), and how files and
the command line become them (`reading`).

Precedence, lowest first: the defaults < the files named by `base:` < the configuration file <
`key=value` on the command line. `configs/quickstart.yaml` with `optimizer.lr=1e-3` trains the
quickstart with that learning rate. An unknown setting, a value of the wrong type and a combination
that cannot work are refused before anything starts.
"""

from emotrain.config.data import DataConfig, RawTokensConfig, RepetitionFilterConfig
from emotrain.config.evaluation import EvaluationConfig
from emotrain.config.finetune import FinetuneConfig
from emotrain.config.kinds import Counts
from emotrain.config.losses import LossConfig
from emotrain.config.profile import ProfileConfig
from emotrain.config.reading import (
    config_from_dict,
    config_to_dict,
    load_config,
    read_settings,
    save_config,
    with_settings,
)
from emotrain.config.rules import check, warnings_of
from emotrain.config.schema import (
    AnnealConfig,
    AttentionConfig,
    Config,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PoolConfig,
    RouterConfig,
    TrainingConfig,
    flatten,
    setting_types,
)

__all__ = [
    "AnnealConfig",
    "AttentionConfig",
    "Config",
    "Counts",
    "DataConfig",
    "EvaluationConfig",
    "ExpertsConfig",
    "FinetuneConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PoolConfig",
    "ProfileConfig",
    "RawTokensConfig",
    "RepetitionFilterConfig",
    "RouterConfig",
    "TrainingConfig",
    "check",
    "config_from_dict",
    "config_to_dict",
    "flatten",
    "load_config",
    "read_settings",
    "save_config",
    "setting_types",
    "warnings_of",
    "with_settings",
]
