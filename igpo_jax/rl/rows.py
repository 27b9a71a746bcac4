"""Rows of samples.jsonl: one for each completion, with all that is known of it.

docs/samples.md describes the fields.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from igpo_jax.data.pipeline import PromptBatch
from igpo_jax.data.records import Record
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.hints.leak import segments
from igpo_jax.rl.sampling import Samples

VERSION = 2  # of the rows' fields; rows of version 1 have neither "version" nor tokens

OWN, HINTED, RESAMPLED = "own", "hinted", "resampled"
KEPT, REPLACED, INSERTED, DROPPED = "kept", "replaced", "inserted", "dropped"


@dataclasses.dataclass(frozen=True)
class Tries:
  """Everything that one step sampled for this process's prompts: the first and the second try.

  Attributes:
    batch: the P prompts.
    own: the first try: the policy's own completions, [P,G,...].
    extra: the second try, [X,G,...]; None if there was none.
    wrong: i64[X], indices of the groups that were tried again, which were all wrong at first.
      `extra` may have more groups than these: they are padding.
    second: how the second try was made, "hinted" or "resampled".
    source: i64[P,G], for each place of a group the number of the completion of the second try that
      was inserted there; -1: none was.
    advantages: f32[P,G], of the completions that are in the groups afterwards.
    shown: bool[X,G], hinted canvases that show the answer's value.
    batches: number of batches that these prompts are, one after another (`rl.refill`).
  """

  batch: PromptBatch
  own: Samples
  extra: Samples | None
  wrong: np.ndarray
  second: str
  source: np.ndarray
  advantages: np.ndarray
  shown: np.ndarray
  batches: int = 1

  def number_of(self, group: int) -> int:
    """The number of a group among those of all processes.

    Groups are numbered batch by batch, and within a batch process by process.
    """
    share = len(self.batch.records) // self.batches
    batch, k = divmod(group, share)
    return (batch * jax.process_count() + jax.process_index()) * share + k


class _Place(NamedTuple):
  """One completion: its group, its number in its try, and what became of it.

  Attributes:
    rank: rows are sorted by it, lowest first.
    group: index of the group among this process's.
    number: number of the completion in its try.
    phase, used, partner: see docs/samples.md.
  """

  rank: int
  group: int
  number: int
  phase: str
  used: str
  partner: int | None


def _places(tries: Tries) -> list[_Place]:
  """All completions, in the order in which they tell most about inpainting.

  Groups in which something was inserted come first, then the others that were all wrong, then the
  rest: `rank` says so. Within a group, every inserted completion is followed by the one that it
  replaced, and the two tries alternate.
  """
  again = set() if tries.extra is None else set(tries.wrong.tolist())
  out = []
  for group in range(len(tries.batch.records)):
    source = tries.source[group].tolist()
    taken = {number: k for k, number in enumerate(source) if number >= 0}
    rank = 0 if taken else 1 if group in again else 2
    first = [
      _Place(rank, group, k, OWN, *((KEPT, None) if number < 0 else (REPLACED, number)))
      for k, number in enumerate(source)
    ]
    second = []
    if group in again:
      fates = [(INSERTED, taken[k]) if k in taken else (DROPPED, None) for k in range(len(source))]
      second = [_Place(rank, group, k, tries.second, *fate) for k, fate in enumerate(fates)]
    out += [place for number, k in taken.items() for place in (second[number], first[k])]
    # The others in turn, so that a few rows of a group show both tries.
    alone = [[place for place in tried if place.partner is None] for tried in (second, first)]
    out += [place for pair in itertools.zip_longest(*alone) for place in pair if place]
  return sorted(out, key=lambda place: place.rank)


def sample_rows(
  tries: Tries,
  tokenizer: Tokenizer,
  limit: int = 0,
  token_stats: Mapping[int, Mapping[str, np.ndarray]] | None = None,
) -> list[dict[str, Any]]:
  """Makes a row for each completion, those first that show what inpainting did.

  Args:
    tries: what one step sampled.
    tokenizer: the run's tokenizer.
    limit: make at most this many rows; 0: all.
    token_stats: number of a group -> name -> [G,L], for the groups that were learned from
      (train/token_stats.py).

  Returns:
    Rows with the fields of docs/samples.md and "rank", by which rows of several processes are
    sorted.
  """
  rows_of = {int(group): row for row, group in enumerate(tries.wrong)}
  out = []
  for place in _places(tries)[: limit or None]:
    own = place.phase == OWN
    samples = tries.own if own or tries.extra is None else tries.extra
    at = (place.group if own else rows_of[place.group], place.number)
    row: dict[str, Any] = {"version": VERSION, "group": tries.number_of(place.group)}
    row["rank"] = place.rank
    row |= completion_fields(tries.batch.records[place.group], samples, at, tokenizer)
    row |= {"phase": place.phase, "used": place.used, "number": place.number}
    row |= {"partner": place.partner, "advantage": None}
    if place.phase == HINTED:
      row["answer_shown"] = bool(tries.shown[at])
    slot = {KEPT: place.number, INSERTED: place.partner}.get(place.used)
    if slot is not None:  # it is in the group that the policy learns from
      row["advantage"] = _short(tries.advantages[place.group, slot])
      stats = (token_stats or {}).get(tries.number_of(place.group))
      if stats is not None:
        row["token_stats"] = {name: _short(values[slot]) for name, values in stats.items()}
    out.append(row)
  return out


def completion_fields(
  record: Record, samples: Samples, at: tuple[int, int], tokenizer: Tokenizer
) -> dict[str, Any]:
  """The fields of a row that one completion has by itself, whatever became of it.

  Args:
    record: the problem.
    samples: completions.
    at: (group, number) of the completion in `samples`.
    tokenizer: the run's tokenizer.
  """
  group, k = at
  tokens = samples.completion[at].tolist()
  return {
    "id": record.id,
    "prompt": record.question,
    "answer": record.answer,
    "completion": samples.texts[group][k],
    "tokens": tokens,
    "pieces": tokenizer.pieces(tokens),
    "hints": segments(samples.hinted[at]),
    "commit_step": samples.commit_step[at].tolist(),
    "commit_logp": _short(samples.commit_logp[at]),
    "reward": float(samples.reward[at]),
    "parts": samples.parts[group][k],
    "correct": bool(samples.correct[at]),
    "status": samples.status[group][k],
    "extracted": samples.extracted[group][k],
    "reason": samples.reason[group][k],
  }


def _short(values: Any) -> Any:
  """Numbers with four digits after the point, which is enough to look at; None where not finite."""
  values = np.asarray(values)
  if values.dtype.kind in "bi":
    return values.tolist()
  rounded = np.round(values.astype(np.float64), 4)
  return np.asarray(np.where(np.isfinite(values), rounded, None)).tolist()
