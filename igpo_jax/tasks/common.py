"""What generated tasks share: options of a URI, splits, chains of transitions, golds as JSON."""

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
  """ "test" for one problem in ten, by a hash of its text, else "train"."""
  digest = hashlib.blake2s(problem.encode(), digest_size=4).digest()
  return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def check_split(split: str) -> None:
  """Raises `UserError` unless `split` is "train" or "test"."""
  if split not in ("train", "test"):
    raise UserError(f"synthetic: split {split!r} is not one of train, test")


def too_few(n: int) -> UserError:
  """The error of a generator that finds no more distinct problems."""
  return UserError(f"synthetic: fewer than {n} distinct problems with these options")


def option_number(option: str, value, kind, low, high):
  """An option of a source's URI as an int or a float (`kind`) within [low, high].

  Raises:
    UserError: it is no number, out of range, or not whole where an int is asked for.
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
  """Two whole-number options of a URI that bound a third number: `least <= low <= high <= most`.

  Raises:
    UserError: one of them is out of range, or they are in the wrong order.
  """
  low = option_number(low_name, low, int, least, most)
  high = option_number(high_name, high, int, least, most)
  if low > high:
    raise UserError(f"synthetic: {low_name}={low}, {high_name}={high}: need {least} <= min <= max")
  return low, high


def option_names(option: str, names: str, signs: dict[str, str]) -> str:
  """The signs of a comma-separated list of names. Example: "add,sub" gives "+-".

  Raises:
    UserError: a name that is not in `signs`.
  """
  kinds = [kind.strip() for kind in names.split(",")]
  for kind in kinds:
    if kind not in signs:
      raise UserError(f"synthetic: {option}={names!r}: {kind!r} is not one of {', '.join(signs)}")
  return "".join(signs[kind] for kind in kinds)


def permutations(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
  """i64[count,size]: `[k, i]` is where transition k takes state i; each row is a permutation."""
  return np.stack([rng.permutation(size) for _ in range(count)])


def wrong_targets(
  right: np.ndarray, doubtful: float, rng: np.random.Generator
) -> dict[tuple[int, int], int]:
  """The doubtful ones of the transitions i64[count,size], and the wrong state each is taken to.

  Args:
    doubtful: their share.
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
  """The states after each of the transitions `taken`, from `start` on.

  Args:
    right: where transitions go.
    wrong: where doubtful ones go when they slip; the walk goes on from there. None: none does.
    slips: with what probability they do, each time.
    rng: draws once for each doubtful transition that is passed.
  """
  states, at = [], start
  for k in map(int, taken):
    slip = rng is not None and (k, at) in (wrong or {}) and rng.random() < slips
    at = wrong[k, at] if wrong and slip else int(right[k, at])
    states.append(at)
  return states


def read_gold(record: Record, task: str, form: str, read: Callable[[Any], T]) -> T:
  """`read(gold)` of a record's gold as plain JSON values; it may be JSON in the answer's place.

  Args:
    form: what it must be, for the message, up to the gold itself.
    read: raises ValueError, KeyError or TypeError where it is something else.

  Raises:
    UserError: it is no JSON, or `read` refuses it.
  """
  gold = record.answer if record.gold is None else record.gold
  try:
    gold = json.loads(gold) if isinstance(gold, str) else gold
    return read(gold)
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{task}: the gold of record {record.id!r} must be {form} {gold!r:.80}"
    ) from error
