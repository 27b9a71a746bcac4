"""What generated tasks share: options of a URI, the split of a problem, what a detour is."""

from __future__ import annotations

import hashlib

from igpo_jax.errors import UserError

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
