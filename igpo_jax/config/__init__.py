"""Every option of the program: what it means, its default, and what may be combined.

`method` has the options of the method itself, `run` those of how a run goes; `tree` makes of them
what a config file edits, `file` loads such files, `fields` says what values an option may have.
"""

from __future__ import annotations

from igpo_jax.config.arms import arms_of
from igpo_jax.config.fields import (
  Count,
  Finite,
  Natural,
  NonNegative,
  Positive,
  Range,
  Share,
  check_section,
  require,
)
from igpo_jax.config.file import load_config_file
from igpo_jax.config.method import (
  RUN_CHOOSES,
  WEIGHTS_FIX,
  Architecture,
  Dtype,
  HintConfig,
  LoRAConfig,
  ModelConfig,
  ModelRun,
  MoEConfig,
  ObjectiveConfig,
  SamplerConfig,
  check_dtype,
  check_trainable,
  full_dtype,
)
from igpo_jax.config.run import (
  STAGES,
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  LogConfig,
  MeshConfig,
  OptimizerConfig,
  RewardConfig,
  RLConfig,
  SFTConfig,
  stop_rule,
)
from igpo_jax.config.tree import check, default_config, freeze, from_json

__all__ = [
  "RUN_CHOOSES",
  "STAGES",
  "WEIGHTS_FIX",
  "Architecture",
  "CheckpointConfig",
  "Config",
  "Count",
  "DataConfig",
  "Dtype",
  "EvalConfig",
  "Finite",
  "HintConfig",
  "LoRAConfig",
  "LogConfig",
  "MeshConfig",
  "MoEConfig",
  "ModelConfig",
  "ModelRun",
  "Natural",
  "NonNegative",
  "ObjectiveConfig",
  "OptimizerConfig",
  "Positive",
  "RLConfig",
  "Range",
  "RewardConfig",
  "SFTConfig",
  "SamplerConfig",
  "Share",
  "arms_of",
  "check",
  "check_dtype",
  "check_section",
  "check_trainable",
  "default_config",
  "freeze",
  "from_json",
  "full_dtype",
  "load_config_file",
  "require",
  "stop_rule",
]
