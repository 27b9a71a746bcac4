"""The arms of the study: one base config, and the options that each arm changes.

Claims share arms: "igpo" is run once per seed, and most claims compare it with another arm. All
arms of a seed start from the same SFT checkpoint, except the one that tests SFT. They see the same
prompts in the same order and sample with the same noise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from igpo_jax.config import Config, default_config, freeze

STEPS, MAPS = 10, 2  # steps of a problem, maps of the task (igpo_jax/tasks/letter_maps.py)
WINDOW = 14  # positions that RL samples; a concise trace has 12 tokens and an end-of-text token
LONG = 32  # positions to which verbose traces are padded
DETOURS = 0.3  # per step of a verbose trace: 19 tokens on average, one in twenty fits the window
TASK = "synthetic:letter_maps?steps={steps}&maps={maps}&table={table}"
CARELESS = "&doubtful=0.35&slips=0.7"


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way to train.

  Attributes:
    label: its name in tables and plots.
    changes: options that differ from the base config, by dotted name.
    sft: the SFT run (a key of `SFT`) from whose checkpoint it starts.
    rl: options of the RL stage's source, which are appended to its URI.
  """

  label: str
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  sft: str = "aligned"
  rl: str = ""


ARMS = {
  "igpo": Arm("IGPO"),
  "grpo": Arm("GRPO", {"rl.exploration": "none"}),
  "resample": Arm("GRPO, as many samples as IGPO", {"rl.exploration": "resample"}),
  "full_hints": Arm("full hints (eta 1)", {"hints.ratio_low": 1.0, "hints.ratio_high": 1.0}),
  "tau_0.05": Arm("tau 0.05", {"objective.entropy_keep": 0.05}),
  "tau_0.5": Arm("tau 0.5", {"objective.entropy_keep": 0.5}),
  "tau_1": Arm("tau 1, no filter", {"objective.entropy_keep": 1.0}),
  "verbose": Arm("IGPO after SFT on verbose traces", sft="verbose"),
  "leak": Arm("answer leaked", {"hints.leak_answer": True}),
  "official": Arm("sequence_official", {"objective.ratio": "sequence_official"}),
  "mean_field": Arm("mean-field", {"rl.estimator": "mean_field"}),
  "random_ratio": Arm("random-ratio", {"rl.estimator": "random_ratio"}),
  "noise_0.1": Arm("a tenth of the trace wrong", rl="&noise=0.1"),
  "noise_0.3": Arm("three tenths wrong", rl="&noise=0.3"),
}
SFT = {"aligned": "", "verbose": f"&detours={DETOURS}"}  # SFT run -> options of its source


def make_config(
  arm: str, seed: int, smoke: bool = False, changes: dict[str, Any] | None = None
) -> Config:
  """The config of an arm, with both stages. Arms with equal `sft` have equal SFT stages.

  Args:
    arm: a key of `ARMS`.
    seed: also chooses the task's table and the problems.
    smoke: tiny settings, for a test.
    changes: further options, by dotted name.
  """
  spec = ARMS[arm]
  config = default_config()
  config.seed = seed
  task = TASK.format(steps=4 if smoke else STEPS, maps=MAPS, table=seed)
  records = 200 if smoke else 20_000
  train = f"{task}&split=train&n={records}"
  config.data.tokenizer = "char:letter_maps"
  config.data.sft = f"{train}&seed={10 * seed + 1}{CARELESS}{SFT[spec.sft]}"
  config.data.rl = f"{train}&seed={10 * seed + 2}{spec.rl}"
  config.data.eval = (f"test={task}&split=test&n={16 if smoke else 512}&seed={10 * seed + 3}",)
  config.data.prompt_buckets = (STEPS + 2,)
  config.reward.verifier = "exact"

  config.model.d_model = 16 if smoke else 64
  config.model.n_layers = 1 if smoke else 2
  config.model.mlp_hidden = 32 if smoke else 256
  config.model.rope_theta = 100.0  # sequences of 26 tokens: 500,000 wastes most frequencies

  config.sampler.gen_length = WINDOW
  config.sampler.block_length = WINDOW // 2
  config.sampler.steps = WINDOW  # one token per step: each letter depends on the one before
  config.sampler.temperature = 1.0

  config.sft.steps = 4 if smoke else 1200
  config.sft.batch_size = 8 if smoke else 64
  config.sft.response_lengths = (LONG,) if spec.sft == "verbose" else ()
  config.sft_optimizer.learning_rate = 5e-3
  config.sft_optimizer.warmup_steps = 1 if smoke else 30
  config.sft_optimizer.schedule = "cosine"
  config.sft_optimizer.weight_decay = 0.01

  config.hints.chunk_min, config.hints.chunk_max = 2, 4  # 9 tokens stand before the answer
  # Two choices keep the policy from forgetting (docs/LOG.md): a KL coefficient above the paper's
  # 0.01, and an estimator that scores every token.
  config.objective.beta = 0.05
  config.rl.estimator = "coupled"
  config.rl.steps = 2 if smoke else 40
  config.rl.prompts_per_step = 2 if smoke else 16
  config.rl.group_size = 4 if smoke else 8
  config.rl.inner_updates = 2
  config.rl.eval_every = 1 if smoke else 10
  config.rl_optimizer.learning_rate = 1e-3
  config.rl_optimizer.warmup_steps = 1 if smoke else 5
  config.rl_optimizer.schedule = "linear"
  config.rl_optimizer.weight_decay = 0.0
  config.rl_optimizer.clip_norm = 1.0

  config.eval.initial = False
  config.eval.batch_size = 16 if smoke else 256
  config.checkpoint.every = 20
  config.checkpoint.keep = 1
  config.log.tensorboard = False
  config.log.samples_every = 0
  config.update_from_flattened_dict(spec.changes | (changes or {}))
  return freeze(config)


def sft_config(sft: str, seed: int, smoke: bool = False) -> Config:
  """The config of an SFT run: that of its arms, but with default options for RL.

  So the SFT checkpoints stay valid when a setting of RL changes.
  """
  arm = next(name for name, spec in ARMS.items() if spec.sft == sft)
  return only_sft(make_config(arm, seed, smoke))


def only_sft(config: Config) -> Config:
  """The SFT stage of a config, with default options for RL."""
  default = Config()
  of_rl = {name: getattr(default, name) for name in ("rl", "rl_optimizer", "objective", "hints")}
  data = dataclasses.replace(config.data, rl="")
  return dataclasses.replace(config, stages=("sft",), data=data, **of_rl)
