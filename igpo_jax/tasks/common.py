"""What the generated tasks share: options of a URI, splits, walks over transitions, JSON golds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from igpo_jax.data.records import Record
from igpo_jax.errors import UserError

T = TypeVar("T")

TEST_SHARE = 10  # one problem in ten belongs to the test split


def split_of(problem: str) -> str:
  """The split that a problem belongs to: "test" for one in ten, by a hash of its text, or "train".

  The same on every machine.
  """
  digest = hashlib.blake2s(problem.encode(), digest_size=4).digest()
  return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def check_split(split: str) -> None:
  """Raises `UserError` unless `split` is "train" or "test"."""
  if split not in ("train", "test"):
    raise UserError(f"synthetic: split {split!r} is not one of train, test")


def too_few(n: int) -> UserError:
  """The error of a generator that finds fewer than the `n` distinct problems it was asked for."""
  return UserError(
    f"synthetic: fewer than {n} distinct problems with these options; lower n, or give options "
    "that allow more, such as more steps"
  )


def option_number(option: str, value, kind, low, high):
  """Reads a number from an option of a source's URI.

  Args:
    option: the option's name, for messages.
    value: a number, or text.
    kind: int or float.
    low, high: the range that it must be in, bounds included.

  Returns:
    The number as `kind`.

  Raises:
    UserError: it is not a number, not whole where `kind` is int, or out of range.
  """
  try:
    number = kind(value)
  except (ValueError, OverflowError) as error:
    raise UserError(f"synthetic: {option}: {error}") from None
  if kind is int and number != float(value):
    raise UserError(f"synthetic: {option}={value} is not a whole number")
  if not low <= number <= high:
    raise UserError(f"synthetic: {option}={number} is not in [{low}, {high}]")
  return number


def option_range(low_name: str, low, high_name: str, high, least: int, most: int):
  """Reads two options of a source's URI that are the bounds of a range of whole numbers.

  Args:
    low_name, high_name: the options' names, for messages.
    low, high: numbers, or text.
    least, most: both must be in this range, bounds included.

  Returns:
    (low, high) as ints.

  Raises:
    UserError: one of them is not a whole number or out of range, or low is above high.
  """
  low = option_number(low_name, low, int, least, most)
  high = option_number(high_name, high, int, least, most)
  if low > high:
    raise UserError(f"synthetic: {low_name}={low}, {high_name}={high}: need {least} <= min <= max")
  return low, high


def option_names(option: str, names: str, signs: dict[str, str]) -> str:
  """Reads an option that lists operations by name.

  Args:
    option: the option's name, for messages.
    names: names separated by commas.
    signs: the sign of each known name.

  Returns:
    The signs as one string: "+-" for "add,sub".

  Raises:
    UserError: a name that is not in `signs`.
  """
  kinds = [kind.strip() for kind in names.split(",")]
  for kind in kinds:
    if kind not in signs:
      raise UserError(f"synthetic: {option}={names!r}: {kind!r} is not one of {', '.join(signs)}")
  return "".join(signs[kind] for kind in kinds)


def permutations(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
  """Random transitions i64[count,size]: transition k takes state i to state [k, i].

  Each row is a permutation, so no two states are taken to the same one.
  """
  return np.stack([rng.permutation(size) for _ in range(count)])


def wrong_targets(
  right: np.ndarray, doubtful: float, rng: np.random.Generator
) -> dict[tuple[int, int], int]:
  """Chooses transitions that traces may get wrong, and a wrong state for each.

  Args:
    right: i64[count,size], where each transition takes each state.
    doubtful: the share of pairs (transition, state) to choose.
    rng: draws the pairs and their wrong states.

  Returns:
    {(transition, state): wrong state} for the chosen pairs.
  """
  count, size = right.shape
  chosen = rng.permutation(count * size)[: round(doubtful * count * size)]
  pairs = [divmod(int(i), size) for i in chosen]
  return {(k, i): (int(right[k, i]) + int(rng.integers(1, size))) % size for k, i in pairs}


def walk(
  right: np.ndarray,
  start: int,
  taken: Iterable[int],
  wrong: Mapping[tuple[int, int], int] | None = None,
  slips: float = 0.0,
  rng: np.random.Generator | None = None,
) -> list[int]:
  """The states that a sequence of transitions leads through.

  Args:
    right: i64[count,size], where each transition takes each state.
    start: the first state.
    taken: numbers of the transitions, in order.
    wrong: `wrong_targets`. When such a transition slips, it goes to its wrong state, and the walk
      continues from there. None: no transition slips.
    slips: the probability that one of them slips, each time it is taken.
    rng: draws once each time that a transition of `wrong` is taken; None: no transition slips.

  Returns:
    The state after each transition; `start` is not included.
  """
  states, at = [], start
  for k in map(int, taken):
    slip = rng is not None and (k, at) in (wrong or {}) and rng.random() < slips
    at = wrong[k, at] if wrong and slip else int(right[k, at])
    states.append(at)
  return states


def read_gold(record: Record, task: str, form: str, read: Callable[[Any], T]) -> T:
  """Reads what a verifier needs from a record: its `gold`, or JSON text in its `answer`.

  Args:
    record: the record.
    task: name of the task, for the message.
    form: what the gold must be, for the message, which continues with the gold itself.
    read: `read(gold)`, where gold is a plain JSON value. It may raise ValueError, KeyError or
      TypeError for a gold that is something else.

  Returns:
    What `read` returns.

  Raises:
    UserError: the gold is not JSON, or `read` raised one of these errors.
  """
  gold = record.answer if record.gold is None else record.gold
  try:
    gold = json.loads(gold) if isinstance(gold, str) else gold
    return read(gold)
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{task}: the gold of record {record.id!r} must be {form} {gold!r:.80}"
    ) from error
