"""IGPO on problems of one's own: from a file of questions, answers and traces to a run.

    python examples/own_data.py DIR           # writes such a file and its tokenizer, to begin with
    python -m igpo_jax.main --config=examples/own_data.py:DIR --dry-run      # reads and grades all
    python -m igpo_jax.main --config=examples/own_data.py:DIR --workdir=runs/own_data

docs/own_data.md says what to look for, and what to change for a file that you have already.
"""

import json
import pathlib
import random
import sys

from igpo_jax.config import default_config
from igpo_jax.data.tokenizer import CharTokenizer


def get_config(folder):
  config = default_config()
  # A line of the file: {"question": ..., "answer": ..., "trace": "... \\boxed{ANSWER}"}
  config.data.sft = config.data.rl = f"jsonl:{folder}/train.jsonl"
  config.data.eval = (f"test=jsonl:{folder}/test.jsonl",)
  config.data.tokenizer = f"{folder}/tokenizer"
  config.data.prompt_buckets = (16,)  # tokens of the longest prompt, or a little more
  config.reward.verifier = "math"

  config.model.d_model, config.model.n_layers, config.model.mlp_hidden = 64, 2, 128
  config.sampler.gen_length, config.sampler.block_length, config.sampler.steps = 32, 8, 16
  config.sampler.temperature = 1.0
  config.hints.chunk_min, config.hints.chunk_max = 2, 4
  config.sft.steps, config.sft.batch_size = 300, 64
  config.sft_optimizer.learning_rate = 3e-3
  config.rl.steps, config.rl.prompts_per_step = 30, 16
  config.rl_optimizer.learning_rate = 1e-3
  return config


def write(folder):
  """Minutes of times of day: 330 problems to train on, 30 to test."""
  folder, problems = pathlib.Path(folder), []
  folder.mkdir(parents=True, exist_ok=True)
  for hours in range(1, 7):
    for minutes in range(60):
      total = 60 * hours + minutes
      trace = f"{60 * hours} and {minutes} is \\boxed{{{total}}}"
      problems.append({"question": f"{hours}h {minutes}m", "answer": f"{total}", "trace": trace})
  random.Random(0).shuffle(problems)
  for name, part in (("train", problems[:330]), ("test", problems[330:])):
    lines = [json.dumps(problem) + "\n" for problem in part]
    (folder / f"{name}.jsonl").write_text("".join(lines))
  texts = [problem[field] for problem in problems for field in ("question", "trace")]
  CharTokenizer("".join(sorted(set("".join(texts))))).save(folder / "tokenizer")


if __name__ == "__main__":
  write(sys.argv[1])
