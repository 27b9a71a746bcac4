"""The whole program on the real GSM8K with a tiny random model: minutes on two CPU cores.

    python -m igpo_jax.main --config=configs/gsm8k_tiny.py:DIR

DIR holds train.jsonl and test.jsonl of the GitHub repository openai/grade-school-math
(folder grade_school_math/data); data/gsm8k where none is given. Accuracy will be near
zero: the point is that real questions, traces and answers go through every stage, with
a SentencePiece vocabulary trained on the train split at the first run, and the grader
(docs/grading.md) as the judge. Add --config.eval.protocol=igpo (or d1, opencompass_block)
to evaluate by a named protocol.
"""

from igpo_jax.config import default_config


def get_config(directory="data/gsm8k"):
  config = default_config()
  train = f"jsonl:{directory}/train.jsonl?format=gsm8k&strip_calculator=true"
  config.data.sft = train
  config.data.rl = f"{train}&limit=2000"
  config.data.eval = (f"gsm8k=jsonl:{directory}/test.jsonl?format=gsm8k",)
  config.data.tokenizer = "sentencepiece:1000"
  config.data.prompt_buckets = (128, 256)
  config.reward.verifier = "math"

  config.model.d_model = 64
  config.model.n_layers = 2
  config.model.mlp_hidden = 192

  config.sampler.gen_length = 128
  config.sampler.block_length = 32
  config.sampler.steps = 32

  config.sft.steps = 40
  config.sft.batch_size = 16
  config.sft_optimizer.learning_rate = 2e-3
  config.sft_optimizer.warmup_steps = 10

  config.rl.steps = 4
  config.rl.prompts_per_step = 4
  config.rl.group_size = 4
  config.rl.inner_updates = 2
  config.rl_optimizer.learning_rate = 1e-4

  config.eval.limit = 32
  config.eval.batch_size = 16
  config.log.samples_every = 1
  return config
