"""Length-Aligned SFT of LLaDA-8B-Instruct (docs/method.md#sft): concise traces of OpenR1-Math.

    python -m igpo_jax.main --config=configs/sft_openr1.py:DATA --workdir=DIR

What follows the colon is as in llada_math.py. DATA holds LLaDA-8B-Instruct/, the benchmarks,
and openr1_aligned.jsonl, the output of `python -m igpo_jax.rewrite` for

    --source="parquet:DATA/openr1/train-*.parquet?format=openr1&solution=generation"
    --tokenizer=DATA/LLaDA-8B-Instruct --max_tokens=1500 --output=DATA/openr1_aligned.jsonl

(docs/length_aligned_sft.md). RL goes on from it with llada_math.py and
--config.init_from=DIR/checkpoints/sft/STEP. The paper's: which traces, their 1500 tokens, the
loss. LLaDA's: 3 epochs, 50 steps of warm-up, decay 0.1 (arXiv 2502.09992). The rest is ours.
"""

import pathlib
import urllib.parse

from igpo_jax.config import load_config_file
from igpo_jax.eval.protocols import IGPO_TEMPLATE


def get_config(argument="data"):
  config = load_config_file(pathlib.Path(__file__).with_name("llada_math.py"), argument)
  data = argument.partition(",")[0]
  config.stages = ("sft",)
  # Fine-tuning asks as RL and evaluation do.
  template = urllib.parse.quote(IGPO_TEMPLATE)
  config.data.sft = f"jsonl:{data}/openr1_aligned.jsonl?template={template}"

  config.sft.epochs = 3.0
  config.sft.batch_size = 64
  # The first is the canvas of RL; the last holds what was accepted.
  config.sft.response_lengths = (256, 512, 1024, 1536)
  # A program for each length of a prompt and each of a response: fewer of them than RL has.
  config.data.prompt_buckets = (128, 256, 512)
  config.sft_optimizer.learning_rate = 1e-5
  config.sft_optimizer.warmup_steps = 50
  config.sft_optimizer.schedule = "linear"
  config.sft_optimizer.weight_decay = 0.1
  config.sft_optimizer.clip_norm = 1.0

  config.data.eval = tuple(e for e in config.data.eval if e.startswith(("gsm8k=", "math500=")))
  config.sft.eval_every = 500
  config.sft.select = "best"
  config.checkpoint.best_metric = "eval/math500/accuracy"
  config.checkpoint.every = 100
  return config
