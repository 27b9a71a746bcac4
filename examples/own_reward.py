"""The quickstart with a reward of one's own: part of it for the letters that are right so far.

    python -m igpo_jax.main --config=examples/own_reward.py --workdir=runs/own_reward

A reward part is a function of the completion's text, the record (its question, answer, trace) and
the verifier's verdict. `reward.weights` says what each part counts.
"""

from igpo_jax.flags import load
from igpo_jax.rewards.score import register_reward


@register_reward("right_so_far")
def right_so_far(completion, record, verdict):
  """The share of the trace's characters that come before the completion's first wrong one."""
  if verdict.correct:
    return 1.0
  right = 0
  for ours, theirs in zip(completion, record.trace, strict=False):
    if ours != theirs:
      break
    right += 1
  return right / len(record.trace)


def get_config():
  config, _ = load("configs/quickstart.py:smoke")
  config.arms = ()
  config.reward.weights = (("correct", 1.0), ("right_so_far", 0.5))
  return config
