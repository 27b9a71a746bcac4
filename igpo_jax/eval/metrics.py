"""Numbers of an evaluation: pass@1, avg@k, pass@k, majority@k, and how sure they are.

Everything is computed from the verdicts of n problems with k completions each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Z95 = 1.959963984540054  # the normal quantile of a two-sided 95% interval


def pass_at(k: int, correct: int, samples: int) -> float:
  """Chance that at least one of k completions drawn without replacement is correct.

  The unbiased estimator 1 - C(n - c, k) / C(n, k) of n samples with c correct (Chen et
  al., arXiv 2107.03374, equation 1).

  Example: `pass_at(2, correct=1, samples=4) == 0.5`.

  Raises:
    ValueError: k is not in 1..samples.
  """
  if not 1 <= k <= samples:
    raise ValueError(f"pass@{k} of {samples} samples")
  return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(votes: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
  """The index of the first vote for the answer that most votes agree on.

  Args:
    votes: extracted answers; None or "" abstains.
    same: whether two answers are one; compared with the first vote of each answer.

  Returns:
    None where all abstain. Of answers with equally many votes, the one named first.
  """
  first: list[int] = []  # of each answer
  count: list[int] = []
  for index, vote in enumerate(votes):
    if not vote:
      continue
    kind = next((k for k, i in enumerate(first) if same(votes[i], vote)), None)
    if kind is None:
      first.append(index)
      count.append(1)
    else:
      count[kind] += 1
  return first[count.index(max(count))] if first else None


def wilson(share: float, n: float, z: float = Z95) -> tuple[float, float]:
  """Wilson's interval of a proportion.

  Unlike share ± z stderr it stays inside [0, 1] and has a width at 0 and 1.

  Args:
    share: observed, in [0, 1].
    n: trials, above 0; may be an effective number.

  Example: 8 of 10 gives (0.490, 0.943).
  """
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  spread = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  return max(0.0, centre - spread), min(1.0, centre + spread)


def accuracy(correct: Sequence[int], samples: int) -> dict[str, float]:
  """Accuracy over all completions, its standard error and 95% interval.

  The completions of one problem are no independent trials, so the standard error is
  that of the mean over problems, sqrt(var / n), and the interval is Wilson's with the
  number of independent trials that has this standard error, between n and n k.

  Args:
    correct: of each of n problems, how many of its completions are correct.
    samples: k.
  """
  n = len(correct)
  shares = [c / samples for c in correct]
  mean = sum(shares) / n
  variance = sum((s - mean) ** 2 for s in shares) / n
  trials = float(n)
  if variance > 0:
    trials = min(max(mean * (1 - mean) / (variance / n), n), n * samples)
  low, high = wilson(mean, trials)
  return {"accuracy": mean, "stderr": math.sqrt(variance / n), "low": low, "high": high}


def summarize(
  problems: Sequence[Sequence[Mapping[str, Any]]], same: Callable[[str, str], bool]
) -> dict[str, float]:
  """All numbers of one benchmark.

  Args:
    problems: of each problem its k rows with "correct", "status" and "extracted".
    same: whether two extracted answers are one vote.

  Returns:
    "accuracy" (pass@1; avg@k with k samples), "stderr", "low", "high" (95%), "n"
    problems, "samples" k, shares "unparseable" and "timeout"; with k > 1 also "pass@j"
    for j = 2, 4, 8, ... and k, and "majority@k".
  """
  n, samples = len(problems), len(problems[0])
  correct = [sum(row["correct"] for row in rows) for rows in problems]
  statuses = [row["status"] for rows in problems for row in rows]
  out: dict[str, float] = accuracy(correct, samples)
  out |= {
    "n": n,
    "samples": samples,
    "unparseable": statuses.count("unparseable") / len(statuses),
    "timeout": statuses.count("timeout") / len(statuses),
  }
  if samples > 1:
    for k in sorted({2**j for j in range(1, samples.bit_length())} | {samples}):
      out[f"pass@{k}"] = sum(pass_at(k, c, samples) for c in correct) / n
    wins = 0
    for rows in problems:
      votes = [row["extracted"] if row["status"] == "ok" else None for row in rows]
      chosen = majority(votes, same)
      wins += chosen is not None and rows[chosen]["correct"]
    out[f"majority@{samples}"] = wins / n
  return out
