"""Verifiers and reward parts by name: what a user's own reward function plugs into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from igpo_jax.data.records import Record
from igpo_jax.errors import UserError

OK, UNPARSEABLE, TIMEOUT = "ok", "unparseable", "timeout"
POOLED = "math"  # the one verifier that runs in worker processes, by `score.Scorer`


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a verifier says of one completion.

  Attributes:
    correct: the completion's answer equals the gold answer.
    extracted: the answer as found in the completion; None where there is none.
    status: "ok", "unparseable" (no answer, or one that cannot be read) or "timeout"
      (reading or comparing it ran over the limit of time or memory). Only "ok" can
      be correct.
  """

  correct: bool
  extracted: str | None
  status: str


Verifier = Callable[[str, Record], Verdict]
RewardFn = Callable[[str, Record, Verdict], float]

_VERIFIERS: dict[str, Verifier] = {}
_READS_GOLDS = {POOLED}
_REWARDS: dict[str, RewardFn] = {}


def register_verifier(name: str, *, reads_golds: bool = False) -> Callable[[Verifier], Verifier]:
  """Registers `fn(completion, record) -> Verdict` under `name`, as a decorator.

  Args:
    reads_golds: a gold trace is a completion that it should call correct. Then RL does not begin
      if it calls fewer of them correct than `reward.gold_floor` asks for.

  Raises:
    ValueError: the name is taken.
  """

  def decorate(fn: Verifier) -> Verifier:
    if name == POOLED or name in _VERIFIERS:
      raise ValueError(f"verifier {name!r} is already registered")
    _VERIFIERS[name] = fn
    if reads_golds:
      _READS_GOLDS.add(name)
    return fn

  return decorate


def register_reward(name: str) -> Callable[[RewardFn], RewardFn]:
  """Registers `fn(completion, record, verdict) -> float` under `name`, as a decorator.

  Raises:
    ValueError: the name is taken.
  """

  def decorate(fn: RewardFn) -> RewardFn:
    if name in _REWARDS:
      raise ValueError(f"reward part {name!r} is already registered")
    _REWARDS[name] = fn
    return fn

  return decorate


def reads_golds(name: str) -> bool:
  """Whether a verifier is one that should call gold traces correct."""
  return name in _READS_GOLDS


def verifier(name: str) -> Verifier:
  """The verifier of that name; a `UserError` names those there are."""
  if name not in _VERIFIERS:
    known = ", ".join(sorted([*_VERIFIERS, POOLED]))
    raise UserError(f"rewards: no verifier {name!r}; known: {known}")
  return _VERIFIERS[name]


def reward(name: str) -> RewardFn:
  """The reward part of that name; a `UserError` names those there are."""
  if name not in _REWARDS:
    raise UserError(f"rewards: no part {name!r}; known: {', '.join(sorted(_REWARDS))}")
  return _REWARDS[name]
