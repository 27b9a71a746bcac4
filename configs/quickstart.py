"""SFT, then IGPO, then evaluation, on a generated task: minutes on two CPU cores.

    python -m igpo_jax.main --config=configs/quickstart.py[:smoke] --workdir=DIR

The preset `smoke` goes the same way in well under a minute, with fewer steps and problems:
it shows that everything runs, and its accuracy says nothing.

Six digit-wise steps on a three-digit number (igpo_jax/tasks/chains.py). The SFT traces
are careless: they forget 65% of the additions, so after SFT about half of the groups on
problems with many additions are all wrong. The RL problems bring correct traces, of which
chunks are hinted; the answer's value never is. Where the numbers differ from the paper's
(docs/method.md#defaults) it is because a trace has 30 tokens here, not 256: shorter chunks,
and tau = 0.5, which keeps a step's three digits where 0.2 would keep one. docs/LOG.md has the
trials, and the comparison of random_ratio with the paper's mean_field.
"""

import re

from igpo_jax.config import default_config
from igpo_jax.errors import UserError

TASK = "synthetic:chains?min_steps=6&max_steps=6&rare=add"


def get_config(preset=""):
  if preset not in ("", "smoke"):
    raise UserError(f"configs/quickstart.py: no preset {preset!r}; known: smoke")
  config = default_config()
  config.data.sft = f"{TASK}&split=train&n=20000&seed=1&rare_share=0.3&skip_share=0.65"
  config.data.rl = f"{TASK}&split=train&n=4000&seed=2&rare_share=0.5"
  config.data.eval = (f"test={TASK}&split=test&n=512&seed=3&rare_share=0.5",)
  config.data.prompt_buckets = (28,)
  config.reward.verifier = "exact"

  config.model.d_model = 96
  config.model.n_layers = 3
  config.model.mlp_hidden = 256
  config.model.rope_theta = 100.0  # sequences of 60 tokens: 500,000 wastes most frequencies

  config.sampler.gen_length = 32
  config.sampler.block_length = 8
  config.sampler.steps = 16
  config.sampler.temperature = 1.0

  config.sft.steps = 400
  config.sft.batch_size = 64
  config.sft_optimizer.learning_rate = 3e-3
  config.sft_optimizer.warmup_steps = 30
  config.sft_optimizer.schedule = "cosine"
  config.sft_optimizer.weight_decay = 0.01

  config.hints.hide_answer_value = True
  config.hints.chunk_min = 3
  config.hints.chunk_max = 5
  config.objective.entropy_keep = 0.5
  config.objective.beta = 0.02
  config.rl.steps = 60
  config.rl.estimator = "random_ratio"
  config.rl.inner_updates = 2
  config.rl_optimizer.learning_rate = 2e-4
  config.rl_optimizer.warmup_steps = 10
  config.rl_optimizer.schedule = "linear"
  config.rl_optimizer.weight_decay = 0.0
  config.rl_optimizer.clip_norm = 1.0

  config.eval.batch_size = 128
  if preset == "smoke":
    _make_small(config)
  return config


def _make_small(config):
  """The same program on less: three steps a problem, a short training, few problems."""
  small = lambda uri, n: re.sub(r"&n=\d+", f"&n={n}", uri).replace("_steps=6", "_steps=3")
  config.data.sft = small(config.data.sft, 2000)
  config.data.rl = small(config.data.rl, 200)
  config.data.eval = tuple(small(uri, 64) for uri in config.data.eval)
  config.data.prompt_buckets = (16,)
  config.sampler.gen_length = 24
  config.sampler.steps = 12
  config.sft.steps = 100
  config.sft_optimizer.warmup_steps = 10
  config.rl.steps = 6
  config.rl.prompts_per_step = 4
  config.rl_optimizer.warmup_steps = 1
  config.eval.batch_size = 64
  config.log.samples_every = 1
