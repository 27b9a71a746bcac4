"""What `import igpo_jax` offers."""

from __future__ import annotations

from igpo_jax.config import (
  Config,
  HintConfig,
  ModelConfig,
  ObjectiveConfig,
  SamplerConfig,
  default_config,
  freeze,
)
from igpo_jax.convert.pretrained import Pretrained, load_pretrained
from igpo_jax.diffusion.sampler import denoise
from igpo_jax.hints.inject import hint_canvas
from igpo_jax.models import make_lm
from igpo_jax.rl.advantages import group_advantages
from igpo_jax.rl.objectives.clipped import policy_loss
from igpo_jax.types import LM, Canvas

__all__ = [
  "LM",
  "Canvas",
  "Config",
  "HintConfig",
  "ModelConfig",
  "ObjectiveConfig",
  "Pretrained",
  "SamplerConfig",
  "default_config",
  "denoise",
  "freeze",
  "group_advantages",
  "hint_canvas",
  "load_pretrained",
  "make_lm",
  "policy_loss",
]
