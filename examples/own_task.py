"""A task of one's own: generated problems, their traces, and how an answer is checked.

    python -m igpo_jax.main --config=examples/own_task.py --workdir=runs/own_task

Words are turned round, a letter at a time: "abcd" has the trace "d dc dcb=>dcba". Registered, a
task has a name in sources (synthetic:NAME), tokenizers (char:NAME) and, with a verifier of its own,
in rewards. igpo_jax/tasks/ has larger ones.
"""

import string

import numpy as np

from igpo_jax.data.records import Record
from igpo_jax.data.task_registry import Task, find_task, register_task
from igpo_jax.flags import load


def make_records(split, n, seed, letters=4):
  """n words; the last letter says which split a word is of, so that the splits share none."""
  rng, alphabet, letters = np.random.default_rng(seed), string.ascii_lowercase, int(letters)
  last = alphabet[:20] if split == "train" else alphabet[20:]
  records = {}
  while len(records) < n:
    word = "".join(rng.choice(list(alphabet), letters - 1)) + str(rng.choice(list(last)))
    answer = word[::-1]
    trace = f"{' '.join(answer[: k + 1] for k in range(letters - 1))}=>{answer}"
    prompt = ({"role": "user", "content": word},)
    span = (trace.index("=>"), len(trace))  # never given as a hint
    records[word] = Record(word, prompt, trace, answer, answer_span=span, task="reverse")
  return list(records.values())


if not find_task("reverse"):
  alphabet = string.ascii_lowercase + " =>"
  register_task(Task("reverse", verifier="exact", make_records=make_records, alphabet=alphabet))


def get_config():
  config, _ = load("configs/quickstart.py:smoke")
  config.arms = ()
  config.data.sft = "synthetic:reverse?split=train&n=2000&seed=1"
  config.data.rl = "synthetic:reverse?split=train&n=500&seed=2"
  config.data.eval = ("test=synthetic:reverse?split=test&n=64&seed=3",)
  config.data.tokenizer = "char:reverse"
  config.data.prompt_buckets = (6,)
  config.sampler.gen_length, config.sampler.block_length, config.sampler.steps = 16, 8, 16
  return config
