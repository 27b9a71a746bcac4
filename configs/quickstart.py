"""SFT, then GRPO and IGPO from the same checkpoint, on a generated task: minutes on two CPU cores.

    python -m igpo_jax.main --config=configs/quickstart.py[:smoke] --workdir=DIR

It ends with one table and one picture (`curves.png`), in which GRPO and IGPO are compared, and one
inpainted example in words. The preset `smoke` goes the same way in less than a minute, with fewer
steps and problems: it shows that everything runs, and its accuracy says nothing.

The problems follow ten maps over 52 letters, a letter a step (igpo_jax/tasks/letter_maps.py). The
SFT traces take 35% of the transitions to a wrong letter, 70% of the time, so after SFT about four
of five groups are all wrong. The RL problems bring correct traces, of which chunks are hinted; the
answer's letter stands nowhere before the answer, so no hint shows it. Chunks have 2 to 4 tokens and
not 5 to 10 as in the paper (docs/method.md#defaults), because a trace has 12 tokens here, not 256.
docs/results.md has this comparison over seeds, and docs/LOG.md the trials, among them why the
estimator is `coupled` and beta 0.05.
"""

import re

from igpo_jax.config import default_config
from igpo_jax.errors import UserError

STEPS = 10  # letters of a trace; it has two more tokens, and its end
TASK = f"synthetic:letter_maps?steps={STEPS}&maps=2"


def get_config(preset=""):
  if preset not in ("", "smoke"):
    raise UserError(f"configs/quickstart.py: no preset {preset!r}; known: smoke")
  config = default_config()
  config.arms = ("GRPO: rl.exploration=none",)  # the run itself is IGPO
  config.data.sft = f"{TASK}&split=train&n=20000&seed=1&doubtful=0.35&slips=0.7"
  config.data.rl = f"{TASK}&split=train&n=20000&seed=2"
  config.data.eval = (f"test={TASK}&split=test&n=512&seed=3",)
  config.data.tokenizer = "char:letter_maps"
  config.data.prompt_buckets = (STEPS + 2,)
  config.reward.verifier = "exact"

  config.model.d_model = 64
  config.model.n_layers = 2
  config.model.mlp_hidden = 256
  config.model.rope_theta = 100.0  # sequences of 26 tokens: 500,000 wastes most frequencies

  config.sampler.gen_length = 14
  config.sampler.block_length = 7
  config.sampler.steps = 14  # one token a step: a letter hangs on the one before
  config.sampler.temperature = 1.0

  config.sft.steps = 1200
  config.sft.batch_size = 64
  config.sft_optimizer.learning_rate = 5e-3
  config.sft_optimizer.warmup_steps = 30
  config.sft_optimizer.schedule = "cosine"
  config.sft_optimizer.weight_decay = 0.01

  config.hints.chunk_min = 2
  config.hints.chunk_max = 4
  config.objective.beta = 0.05
  config.rl.estimator = "coupled"
  config.rl.steps = 40
  config.rl.prompts_per_step = 16
  config.rl.inner_updates = 2
  config.rl.eval_every = 10
  config.rl_optimizer.learning_rate = 1e-3
  config.rl_optimizer.warmup_steps = 5
  config.rl_optimizer.schedule = "linear"
  config.rl_optimizer.weight_decay = 0.0
  config.rl_optimizer.clip_norm = 1.0

  config.eval.batch_size = 256
  config.log.samples_every = 5
  if preset == "smoke":
    _make_small(config)
  return config


def _make_small(config):
  """The same program on less: six letters a problem, a short training, few problems."""
  small = lambda uri, n: re.sub(r"&n=\d+", f"&n={n}", uri).replace(f"steps={STEPS}", "steps=6")
  config.data.sft = small(config.data.sft, 1000)
  config.data.rl = small(config.data.rl, 200)
  config.data.eval = tuple(small(uri, 64) for uri in config.data.eval)
  config.sft.steps = 100
  config.sft_optimizer.warmup_steps = 10
  config.rl.steps = 6
  config.rl.prompts_per_step = 4
  config.rl.eval_every = 3
  config.rl_optimizer.warmup_steps = 1
  config.eval.batch_size = 64
  config.log.samples_every = 1
