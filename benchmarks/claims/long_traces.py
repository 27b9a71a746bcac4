"""The claims that need long traces: on `synthetic:stories`, with hints of 5 to 10 words.

A trace has 47 words, six a step. So a chunk shows a step or parts of two, and the entropy filter
has up to 45 hint words to choose from, most of which the policy is sure of. The SFT traces are told
in a habitual phrasing. The traces that hints are cut from are told in the other one, in which the
policy seldom tells a step: as in the paper, hints are another writer's words. docs/results.md has
what came out.

All runs are made in one process (`benchmarks.shared_runs`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from benchmarks import study
from benchmarks.claims.arms import Arm, only_sft
from benchmarks.claims.claims import (
  AFTER,
  BEFORE,
  EXTRA,
  FALL,
  KL,
  LEFT,
  NORM,
  REWARD,
  Claim,
  Study,
)
from benchmarks.shared_runs import SharedRuns
from igpo_jax.config import Config, default_config, freeze

RIDES, SENTENCE = 8, 6  # rides of a problem, words of a step
SHORT, COPIES = 3, 40  # rides of short problems, and how often the SFT data have each of them
TASK = "synthetic:stories?lines=2&stops=16&table={table}&steps={rides}"
POLICY = "&phrasings=2&habit=0.9&habitual=1"  # how the traces of SFT are told
WRITER = "&phrasings=2&habit=1&habitual=2"  # how those of RL are told
CARELESS = "&doubtful=0.35&slips=0.7"  # of SFT
RATE, HIGH_RATE = 1e-3, 3e-3


def _fast(changes: dict[str, Any]) -> dict[str, Any]:
  return {"rl_optimizer.learning_rate": HIGH_RATE} | changes


def _ratio(low: float, high: float) -> dict[str, Any]:
  return {"hints.ratio_low": low, "hints.ratio_high": high}


def _keep(tau: float) -> dict[str, Any]:
  return {"objective.entropy_keep": tau}


ARMS = {
  "igpo": Arm("IGPO (eta 0.2 to 0.6, tau 0.2)"),
  "full_hints": Arm("full hints (eta 1)", _ratio(1.0, 1.0)),
  "grpo": Arm("GRPO", {"rl.exploration": "none"}),
  "most_hints": Arm("eta 0.6 to 0.9", _ratio(0.6, 0.9)),
  "apart": Arm("IGPO, last ride never shown", rl="&apart=1"),
  "leak": Arm("answer leaked", {"hints.leak_answer": True}),
  "noise_0.1": Arm("a tenth of the stops wrong", rl="&noise=0.1"),
  "noise_0.3": Arm("three tenths wrong", rl="&noise=0.3"),
  "tau_1": Arm("tau 1, no filter", _keep(1.0)),
  "fast_tau_1": Arm("tau 1, high rate", _fast(_keep(1.0))),
  "tau_0.5": Arm("tau 0.5", _keep(0.5)),
  "fast_tau_0.5": Arm("tau 0.5, high rate", _fast(_keep(0.5))),
  "tau_0.05": Arm("tau 0.05", _keep(0.05)),
  "fast_tau_0.05": Arm("tau 0.05, high rate", _fast(_keep(0.05))),
  "fast": Arm("tau 0.2, high rate", _fast({})),
  "concise": Arm("IGPO after SFT on concise traces", sft="concise", rl="&filler=0"),
}
# SFT run -> options of its source. Both have the same canvas, in which both kinds of traces fit.
SFT = {"aligned": "", "concise": "&filler=0"}

CLAIMS = {
  4: Claim(
    "Partial hints (eta in 0.2..0.6) > full hints > none, with long traces",
    "Partial hints, full hints or none: which is best with long traces?",
    ("igpo", "most_hints", "full_hints", "apart", "grpo"), (AFTER, LEFT, EXTRA),
    (("igpo", "full_hints", AFTER), ("igpo", "most_hints", AFTER), ("full_hints", "grpo", AFTER),
     ("igpo", "grpo", AFTER), ("apart", "igpo", AFTER)), seeds=8,
  ),
  5: Claim(
    "The entropy filter: tau 0.2 is best, tau 1 unstable, with long traces",
    "The entropy filter: which tau is best with long traces, and is tau 1 unstable?",
    ("tau_0.05", "igpo", "tau_0.5", "tau_1", "fast_tau_0.05", "fast", "fast_tau_0.5",
     "fast_tau_1"), (AFTER, FALL, NORM, KL),
    (("igpo", "tau_0.05", AFTER), ("igpo", "tau_0.5", AFTER), ("igpo", "tau_1", AFTER),
     ("tau_1", "igpo", FALL), ("tau_1", "igpo", NORM), ("tau_1", "igpo", KL),
     ("fast", "fast_tau_0.05", AFTER), ("fast", "fast_tau_0.5", AFTER),
     ("fast", "fast_tau_1", AFTER), ("fast_tau_1", "fast", FALL), ("fast_tau_1", "fast", NORM),
     ("fast_tau_1", "fast", KL)), seeds=8,
  ),
  6: Claim(
    "SFT on concise traces > on wordy ones with room for both, and so is the RL after it",
    "Is RL better after SFT on concise traces than on wordy ones, with room for both?",
    ("concise", "igpo"), (BEFORE, AFTER, LEFT),
    (("concise", "igpo", BEFORE), ("concise", "igpo", AFTER)), seeds=8,
  ),
  7: Claim(
    "What a leaked answer does, with long traces (official code)",
    "What does a leaked answer do with long traces (official code)?",
    ("igpo", "leak", "grpo"), (AFTER, REWARD, LEFT, EXTRA),
    (("leak", "igpo", AFTER), ("leak", "igpo", REWARD), ("leak", "grpo", AFTER)), seeds=8,
  ),
  10: Claim(
    "Noise in long traces",
    "What does noise in long traces do?",
    ("igpo", "noise_0.1", "noise_0.3"), (AFTER, LEFT, EXTRA),
    (("noise_0.1", "igpo", AFTER), ("noise_0.3", "igpo", AFTER)), seeds=8,
  ),
}  # fmt: skip
LONG_TRACES = Study(CLAIMS, ARMS, one_process=True)
# Networks of lines are drawn, and the one of this seed has fewer problems than a run takes.
SHORT_OF_PROBLEMS, IN_ITS_PLACE = 6, 60


def make_config(
  arm: str, seed: int, smoke: bool = False, changes: dict[str, Any] | None = None
) -> Config:
  """The config of an arm, with both stages. Arms with equal `sft` have equal SFT stages.

  Args:
    arm: a key of `ARMS`.
    seed: also chooses the network of lines and the problems. So seeds have SFT runs of their own,
      and intervals over seeds are over networks, too.
    smoke: tiny settings, for a test.
    changes: further options, by dotted name.
  """
  spec = ARMS[arm]
  config = default_config()
  config.seed = seed
  rides = 5 if smoke else RIDES
  network = IN_ITS_PLACE if seed == SHORT_OF_PROBLEMS else seed
  task, short = (TASK.format(rides=k, table=network) for k in (rides, SHORT))
  train = f"{task}&split=train&n={60 if smoke else 2000}"
  config.data.tokenizer = "words:stories"
  # Where a stop is the one of a few before it, the model finds sooner where to look.
  sources = [f"{train}&seed={10 * seed + 1}"]
  sources += [f"{short}&split=train&n=70&seed={k}" for k in range(1 if smoke else COPIES)]
  config.data.sft = "mix:" + " | ".join(
    f"{uri}{POLICY}{CARELESS}{SFT[spec.sft]}" for uri in sources
  )
  config.data.rl = f"{train}&seed={10 * seed + 2}{WRITER}{spec.rl}"
  config.data.eval = (f"test={task}&split=test&n={8 if smoke else 200}&seed={10 * seed + 3}",)
  config.data.prompt_buckets = (2 * SHORT + 6, 2 * rides + 6)
  config.reward.verifier = "exact"

  config.model.d_model = 16 if smoke else 64
  config.model.n_layers = 1 if smoke else 2
  config.model.mlp_hidden = 32 if smoke else 256
  config.model.rope_theta = 30.0  # what matters is six words away
  config.model.tie_embeddings = True

  config.sampler.gen_length = SENTENCE * rides
  config.sampler.block_length = SENTENCE
  config.sampler.steps = 2 * rides  # of a sentence, the surer words first
  config.sampler.temperature = 1.0
  config.sampler.cache = "dual"

  config.sft.steps = 2 if smoke else 1300
  config.sft.response_lengths = (SENTENCE * SHORT, SENTENCE * rides)
  config.sft.batch_size = 8 if smoke else 32
  config.sft_optimizer.learning_rate = 5e-3
  config.sft_optimizer.warmup_steps = 1 if smoke else 50
  config.sft_optimizer.schedule = "cosine"
  config.sft_optimizer.weight_decay = 0.01

  config.objective.beta = 0.05  # as on letter maps
  config.rl.estimator = "coupled"
  config.rl.steps = 2 if smoke else 32
  config.rl.prompts_per_step = 2 if smoke else 8
  config.rl.group_size = 4 if smoke else 8
  config.rl.inner_updates = 2
  config.rl.eval_every = 1 if smoke else 8
  config.rl_optimizer.learning_rate = RATE
  config.rl_optimizer.warmup_steps = 1 if smoke else 3
  config.rl_optimizer.schedule = "constant"
  config.rl_optimizer.weight_decay = 0.0
  config.rl_optimizer.clip_norm = 1.0

  config.eval.initial = False
  config.eval.batch_size = 8 if smoke else 256
  config.checkpoint.every = 0
  config.log.tensorboard = False
  config.log.samples_every = 0
  config.update_from_flattened_dict(spec.changes | (changes or {}))
  return freeze(config)


@dataclasses.dataclass(frozen=True)
class Task(study.Task):
  """One run: an arm. Its SFT stage is made by what the runs share."""

  @property
  def config(self) -> Config:
    return make_config(self.name, self.seed, self.smoke)


def sft_run(config: Config, workdir: epath.Path) -> tuple[Config, epath.Path]:
  """(config, workdir) of the SFT run that a run starts from."""
  name = next(n for n, options in SFT.items() if config.data.sft.endswith(CARELESS + options))
  return only_sft(config), workdir / f"sft{config.seed}_{name}"


def share(workdir: epath.Path, smoke: bool) -> SharedRuns:
  """What the runs of a study share."""
  return SharedRuns(make_config("igpo", 0, smoke), lambda config: sft_run(config, workdir))
