"""SFT on `synthetic:stories`: traces of 65 words, most of which are filler.

    python -m igpo_jax.main --config=configs/stories.py[:smoke] --workdir=DIR

Eleven rides over 16 stops on two lines (igpo_jax/tasks/stories.py): 32 transitions to know, which
are a sixth of the words. Problems of three rides are among the training data, because the model
finds sooner where to look if a stop is the one of a few before it. docs/LOG.md has what was tried,
docs/results.md what is learnt. The preset `smoke` goes the same way in seconds, and its accuracy
says nothing.
"""

import re

from igpo_jax.config import default_config
from igpo_jax.errors import UserError

RIDES, SHORT, SENTENCE = 11, 3, 6  # of all problems, of the short ones; words of a ride
TASK = "synthetic:stories?lines=2&stops=16&phrasings=2&habit=0.9"


def get_config(preset=""):
  if preset not in ("", "smoke"):
    raise UserError(f"configs/stories.py: no preset {preset!r}; known: smoke")
  config = default_config()
  config.stages = ("sft",)
  sources = [f"{TASK}&steps={RIDES}&split=train&n=4000&seed=1"]
  sources += [f"{TASK}&steps={SHORT}&split=train&n=70&seed={k}" for k in range(40)]
  config.data.sft = "mix:" + " | ".join(sources)
  config.data.eval = (f"test={TASK}&steps={RIDES}&split=test&n=256&seed=3",)
  config.data.tokenizer = "words:stories"
  # An ordinal and a line for each ride, five words, the end.
  config.data.prompt_buckets = (2 * SHORT + 6, 2 * RIDES + 6)
  config.reward.verifier = "exact"

  config.model.d_model = 64
  config.model.n_layers = 2
  config.model.mlp_hidden = 256
  config.model.rope_theta = 30.0  # the stop before is six words away
  config.model.tie_embeddings = True

  config.sampler.gen_length = RIDES * SENTENCE  # the last sentence has a word less, and its end
  config.sampler.block_length = SENTENCE
  config.sampler.steps = 2 * RIDES  # of a sentence, the surer words first

  config.sft.response_lengths = (SHORT * SENTENCE, RIDES * SENTENCE)
  config.sft.steps = 1800
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
