"""Metrics of an evaluation: pass@1, avg@k, pass@k and majority@k, with confidence intervals.

They are computed from the verdicts on n problems with k completions each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Z95 = 1.959963984540054  # the normal quantile of a two-sided 95% interval


def pass_at(k: int, correct: int, samples: int) -> float:
  """The unbiased estimate of pass@k: the chance that at least one of k completions is correct.

  It is 1 - C(n - c, k) / C(n, k) for n samples of which c are correct (Chen et al., arXiv
  2107.03374, equation 1).

  Args:
    k: number of completions that are drawn.
    correct: c, how many of the problem's completions are correct.
    samples: n, how many completions the problem has.

  Example: `pass_at(2, correct=1, samples=4) == 0.5`.

  Raises:
    ValueError: k is not in 1..samples.
  """
  if not 1 <= k <= samples:
    raise ValueError(f"pass@{k} of {samples} samples")
  return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(votes: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
  """The index of the first vote for the answer with the most votes.

  Args:
    votes: the extracted answers of a problem's completions; None or "" is no vote.
    same: whether two answers are equal. A vote is compared with the first vote for each answer.

  Returns:
    The index; None without any vote. Of several answers with the most votes, the one that was
    voted for first wins.
  """
  first: list[int] = []  # index of the first vote for each answer
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
  """Wilson's confidence interval of a proportion: (low, high).

  Unlike share ± z * stderr, it stays inside [0, 1] and has a positive width for shares 0 and 1.

  Args:
    share: the observed proportion, in [0, 1].
    n: number of trials, above 0. It may be an effective number, which need not be whole.
    z: quantile of the normal distribution; the default gives a 95% interval.

  Example: 8 of 10 gives (0.490, 0.943).
  """
  center = (share + z * z / (2 * n)) / (1 + z * z / n)
  spread = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  # At shares of 0 and 1 an end is the share itself, but for rounding.
  return max(0.0, min(share, center - spread)), min(1.0, max(share, center + spread))


def accuracy(correct: Sequence[int], samples: int) -> dict[str, float]:
  """Accuracy over all completions, its standard error and 95% interval.

  The completions of one problem are not independent trials. So the standard error is that of the
  mean over the n problems, sqrt(variance / n). The interval is Wilson's (`wilson`) for the number
  of independent trials that would have this standard error; it lies between n and n k.

  Args:
    correct: for each of the n problems, the number of its completions that are correct.
    samples: k, the number of completions of each problem.

  Returns:
    "accuracy", "stderr", and "low" and "high" of the interval.
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


def benchmark_metrics(
  problems: Sequence[Sequence[Mapping[str, Any]]], same: Callable[[str, str], bool]
) -> dict[str, float]:
  """All metrics of one benchmark.

  Args:
    problems: for each problem its k rows, with "correct", "status" and "extracted".
    same: whether two extracted answers are equal, for the majority vote.

  Returns:
    "accuracy" (pass@1, or avg@k with k samples), its "stderr", and "low" and "high" of its 95%
    interval; "n", the number of problems; "samples", k; "unparseable" and "timeout", shares of the
    rows. With k > 1 also "pass@j" for j = 2, 4, 8, ... and k, and "majority@k", the share of
    problems whose majority answer is correct. All shares are in [0, 1].
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
