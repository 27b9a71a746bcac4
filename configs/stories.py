"""SFT on `synthetic:stories`: traces of 71 words, most of which are filler.

    python -m igpo_jax.main --config=configs/stories.py[:smoke] --workdir=DIR

Eight rides over 24 stops on two lines (igpo_jax/tasks/stories.py): 48 transitions to know, which
are a ninth of the words. docs/LOG.md has what was tried to learn them. The preset `smoke` goes the
same way in seconds, and its accuracy says nothing.
"""

import re

from igpo_jax.config import default_config
from igpo_jax.errors import UserError

RIDES, SENTENCE = 8, 9  # SENTENCE: words of a ride
TASK = f"synthetic:stories?steps={RIDES}&lines=2&stops=24&phrasings=2&habit=0.9"


def get_config(preset=""):
  if preset not in ("", "smoke"):
    raise UserError(f"configs/stories.py: no preset {preset!r}; known: smoke")
  config = default_config()
  config.stages = ("sft",)
  config.data.sft = f"{TASK}&split=train&n=2500&seed=1"
  config.data.eval = (f"test={TASK}&split=test&n=256&seed=3",)
  config.data.tokenizer = "words:stories"
  config.data.prompt_buckets = (2 * RIDES + 8,)  # an ordinal and a line for each ride, five words
  config.reward.verifier = "exact"

  config.model.d_model = 64
  config.model.n_layers = 2
  config.model.mlp_hidden = 256
  config.model.rope_theta = 300.0  # sequences of 96 words
  config.model.tie_embeddings = True

  config.sampler.gen_length = RIDES * SENTENCE  # the last sentence has a word less, and its end
  config.sampler.block_length = SENTENCE
  config.sampler.steps = 2 * RIDES  # of a sentence, the surer words first

  config.sft.steps = 1200
  config.sft.batch_size = 32
  config.sft_optimizer.learning_rate = 5e-3
  config.sft_optimizer.warmup_steps = 50
  config.sft_optimizer.schedule = "cosine"
  config.sft_optimizer.weight_decay = 0.01

  config.eval.initial = False
  config.eval.batch_size = 128
  config.log.tensorboard = False
  config.log.every = 10
  if preset == "smoke":
    small = lambda uri, n: re.sub(r"&n=\d+", f"&n={n}", uri)
    config.data.sft = small(config.data.sft, 64)
    config.data.eval = tuple(small(uri, 8) for uri in config.data.eval)
    config.sft.steps, config.sft.batch_size = 2, 8
    config.model.d_model, config.model.mlp_hidden = 16, 32
  return config
