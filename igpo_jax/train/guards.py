"""Stop rules: a run that has collapsed ends, with its state saved, instead of going on.

log.stop_when=("rl/repeated > 0.9", "rl/entropy_floor < 0.01")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from igpo_jax.config import STAGES, LogConfig, stop_rule
from igpo_jax.errors import UserError


class Rule(NamedTuple):
  """One rule of `log.stop_when`.

  Attributes:
    metric: the metric's name in metrics.jsonl.
    is_above: whether the rule holds above the limit; else it holds below it.
    limit: the limit.
  """

  metric: str
  is_above: bool
  limit: float

  def holds(self, value: float) -> bool:
    """Whether a value of the metric is beyond the limit. NaN always is."""
    return math.isnan(value) or (value > self.limit if self.is_above else value < self.limit)


class Guards:
  """Watches the logged rows of one stage.

  Attributes:
    rules: the rules that are about this stage or about evaluations.
  """

  def __init__(self, log: LogConfig, stage: str):
    rules = [Rule(*stop_rule(text)) for text in log.stop_when]
    others = tuple(f"{name}/" for name in STAGES if name not in (stage, "eval"))
    self.rules = [rule for rule in rules if not rule.metric.startswith(others)]
    self._stage, self._patience = stage, log.stop_patience
    self._in_a_row = [0] * len(self.rules)

  def reason(self, row: Mapping[str, Any]) -> str:
    """Why the run has to stop after this row; "" if it does not.

    It counts for each rule in how many rows in a row it held. Rows without the rule's metric, such
    as those without an evaluation, do not change the count.

    Raises:
      UserError: a rule is about a metric that the stage does not have.
    """
    for k, rule in enumerate(self.rules):
      if rule.metric not in row:
        if rule.metric.startswith(f"{self._stage}/"):
          near = ", ".join(sorted(name for name in row if name.startswith(f"{self._stage}/")))
          raise UserError(
            f"config: log.stop_when: there is no metric {rule.metric!r}; {self._stage} has {near}"
          )
        continue
      value = float(row[rule.metric])
      self._in_a_row[k] = self._in_a_row[k] + 1 if rule.holds(value) else 0
      if self._in_a_row[k] >= self._patience:
        times = "" if self._patience == 1 else f", {self._patience} times in a row"
        beyond = "above" if rule.is_above else "below"
        return f"{rule.metric}={value:.4g} is {beyond} {rule.limit:g}{times} (log.stop_when)"
    return ""
