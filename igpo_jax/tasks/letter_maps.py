"""Letter maps, the task of the claims study: follow a chain of maps from letters to letters.

    problem  k301     start at k, apply map 3, then map 0, then map 1
    trace    fT=>w    map 3 takes k to f, map 0 takes f to T; the answer: map 1 takes T to w

Each map is a permutation of 52 letters, drawn once for each `table`. There is nothing to compute:
a model has to know every transition, which is a pair (map, letter), and it learns each one by
itself. That is what the study needs (docs/results.md says why):

  * After SFT the policy knows most transitions and is unsure of some. The SFT traces take a share
    of the transitions (`doubtful`) to a wrong letter with some probability (`slips`); it is always
    the same wrong letter. A chain is right only if all its transitions are. Each doubtful
    transition has to be corrected by its own examples: no single habit explains them all, as one
    does in `synthetic:chains`.
  * Permutations never bring two paths together. So an error anywhere loses the answer, except by
    luck, about 1 time in 52.
  * By construction the answer's letter is nowhere in the trace before the answer, so no hint can
    show it.

Verbose traces (`detours`) write a step out before its result ("k3=f"), write a wrong letter and
take it back ("g-f"), or state a letter twice ("f=f"). Without its detours a verbose trace is the
concise one. The task has a second name: `synthetic:maps`, `char:maps`, `--rules=maps`.
"""

from __future__ import annotations

import functools
import re
import string

import numpy as np

from igpo_jax.data.records import Record
from igpo_jax.data.task_registry import Task, register_task
from igpo_jax.tasks import common
from igpo_jax.tasks.common import option_number, split_of

NAME = "letter_maps"
LETTERS = string.ascii_letters
ALPHABET = LETTERS + string.digits + "=>-"


@functools.lru_cache(maxsize=64)
def tables(table: int, maps: int, letters: int = len(LETTERS)) -> np.ndarray:
  """The maps i64[maps,letters]: map m takes letter number i to letter number [m, i].

  Args:
    table: the seed that the maps are drawn from.
    maps: number of maps.
    letters: number of letters.
  """
  rng = np.random.default_rng([table, maps])
  return common.permutations(rng, maps, letters)


@functools.lru_cache(maxsize=64)
def wrong_targets(
  table: int, maps: int, doubtful: float, letters: int = len(LETTERS)
) -> dict[tuple[int, int], int]:
  """The doubtful transitions of `tables`, as {(map, letter): wrong letter}, all by number.

  Args:
    table, maps, letters: as for `tables`.
    doubtful: the share of transitions that are doubtful.
  """
  rng = np.random.default_rng([table, maps, round(doubtful * 1000)])
  return common.wrong_targets(tables(table, maps, letters), doubtful, rng)


def with_detours(problem: str, path: str, mean: float, rng: np.random.Generator) -> str:
  """Writes the verbose trace of a path.

  Args:
    problem: such as "k301".
    path: the letters after each step, such as "fTw".
    mean: detours at each step, on average; their number has a Poisson distribution.
    rng: draws the detours.
  """
  out, before = [], problem[0]
  for step, letter in enumerate(path):
    last = step == len(path) - 1  # its result is the answer: stated once, after "=>"
    again = 0
    for _ in range(rng.poisson(mean)):
      kind = rng.integers(3)
      if kind == 0:  # not from the answer's letter, which may be the start
        out.append(f"{before}{problem[1 + step]}=" if before != path[-1] else "")
      elif kind == 1:
        others = [x for x in LETTERS if x not in (letter, path[-1])]
        out.append(f"{others[rng.integers(len(others))]}-")
      else:
        again += not last
    out.append(f"=>{letter}" if last else letter + f"={letter}" * again)
    before = letter
  return "".join(out)


def without_detours(trace: str) -> str:
  """The concise trace inside a verbose one. Example: "k3=fg-T=T=>w" gives "fT=>w"."""
  return re.sub(r"[A-Za-z]\d=|[A-Za-z]-|=[A-Za-z]", "", trace)


def make_records(
  split: str,
  n: int,
  seed: int = 0,
  steps: int | str = 12,
  maps: int | str = 4,
  letters: int | str = len(LETTERS),
  table: int | str = 0,
  doubtful: float | str = 0.0,
  slips: float | str = 0.0,
  noise: float | str = 0.0,
  detours: float | str = 0.0,
) -> list[Record]:
  """Distinct problems of one split, the same on every machine.

  Args:
    split: "train" or "test".
    n: number of problems.
    seed: seed of the generator.
    steps: how many maps a problem applies, 1 to 64.
    maps: how many maps there are, 1 to 10.
    letters: how many letters the maps are of, 4 to 52. With few a problem of many steps, whose
      answer is nowhere before, is seldom found.
    table: seed of the permutations, and of which transitions are doubtful.
    doubtful: the share of transitions that traces may take to a wrong letter.
    slips: the probability that a trace does so, each time it takes such a transition. The trace
      goes on from there to a wrong answer. The record's `answer` is right all the same.
    noise: each letter before the answer is replaced by a random other one with this probability.
      The rest of the trace does not change.
    detours: number of detours at each step of a trace, on average (`with_detours`).

  Raises:
    UserError: an unknown split, options out of range, or too few such problems.
  """
  common.check_split(split)
  steps = option_number("steps", steps, int, 1, 64)
  maps = option_number("maps", maps, int, 1, 10)
  letters = option_number("letters", letters, int, 4, len(LETTERS))
  table = option_number("table", table, int, 0, 2**31)
  shares = {"doubtful": doubtful, "slips": slips, "noise": noise}
  doubtful, slips, noise = (option_number(k, v, float, 0, 1) for k, v in shares.items())
  detours = option_number("detours", detours, float, 0, 10)

  right, wrong = tables(table, maps, letters), wrong_targets(table, maps, doubtful, letters)
  rng = np.random.default_rng([seed, table, steps, maps])
  writing = np.random.default_rng([seed, table, 1])  # for traces only: it changes no problem
  records: dict[str, Record] = {}
  for _ in range(100 * n + 1000):
    if len(records) == n:
      break
    start = int(rng.integers(letters))
    applied = rng.integers(maps, size=steps)
    problem = LETTERS[start] + "".join(map(str, applied))
    *before, answer = common.walk(right, start, applied)
    if problem in records or answer in before or split_of(problem) != split:
      continue
    written = common.walk(right, start, applied, wrong, slips, writing)
    for step in range(steps - 1):
      if noise and writing.random() < noise:
        others = [i for i in range(letters) if i not in (written[step], answer)]
        written[step] = others[writing.integers(len(others))]
    path = "".join(LETTERS[i] for i in written)
    trace = f"{path[:-1]}=>{path[-1]}"
    if detours:
      trace = with_detours(problem, path, detours, writing)
    records[problem] = Record(
      id=problem,
      prompt=({"role": "user", "content": problem},),
      trace=trace,
      answer=LETTERS[answer],
      answer_span=(trace.index("=>"), len(trace)),
      task=NAME,
    )
  if len(records) < n:
    raise common.too_few(n)
  return list(records.values())


register_task(
  Task(
    NAME,
    verifier="exact",
    make_records=make_records,
    alphabet=ALPHABET,
    trim=lambda trace, answer, count, max_tokens: without_detours(trace),
    aliases=("maps",),
  )
)
