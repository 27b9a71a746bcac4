"""Letter maps, the task of the claims study: follow a chain of maps over letters, a letter a step.

    problem  k301     start at k, apply map 3, then map 0, then map 1
    trace    fT=>w    map 3 takes k to f, map 0 takes f to T; the answer: map 1 takes T to w

Each map is a permutation of 52 letters, drawn once for a `table`. There is nothing to
compute, only to know: a transition is a pair (map, letter), and a model learns each on
its own. That is what the study needs (docs/results.md says why):

  * The policy after SFT knows most transitions and is unsure of some: the SFT traces take a
    share of them (`doubtful`) to a wrong letter, always the same, most of the time (`slips`).
    A chain is right only if every transition is. Each doubtful one has to be put right by
    examples of its own: no single habit explains them all, as it does in `synthetic:chains`.
  * Permutations never bring two paths together, so an error anywhere loses the answer, but
    for luck of about 1 in 52.
  * The answer's letter stands nowhere in the trace before the answer, by construction, so
    no hint can show it.

Verbose traces (`detours`) write a step out before its result ("k3=f"), put a wrong letter
down and take it back ("g-f"), or state a letter twice ("f=f"). Without them they are the
concise ones again. The task is also called `maps`: `synthetic:maps`, `char:maps`, `--rules=maps`.
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
def tables(table: int, maps: int) -> np.ndarray:
  """i64[maps,52]: `tables(t, n)[m, i]` is where map m takes letter i; a permutation each."""
  rng = np.random.default_rng([table, maps])
  return common.permutations(rng, maps, len(LETTERS))


@functools.lru_cache(maxsize=64)
def wrong_targets(table: int, maps: int, doubtful: float) -> dict[tuple[int, int], int]:
  """The doubtful transitions (map, letter), and the wrong letter that each is taken to."""
  rng = np.random.default_rng([table, maps, round(doubtful * 1000)])
  return common.wrong_targets(tables(table, maps), doubtful, rng)


def with_detours(problem: str, path: str, mean: float, rng: np.random.Generator) -> str:
  """The verbose trace of a path, with a Poisson number of detours at each step."""
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
  table: int | str = 0,
  doubtful: float | str = 0.0,
  slips: float | str = 0.0,
  noise: float | str = 0.0,
  detours: float | str = 0.0,
) -> list[Record]:
  """Distinct problems of one split, the same on every machine.

  Args:
    split: "train" or "test".
    n: how many.
    seed: of the generator.
    steps: maps that a problem applies.
    maps: how many there are, 1 to 10.
    table: which permutations, and which transitions are doubtful.
    doubtful: the share of transitions that the traces may take to a wrong letter.
    slips: with what probability they do, each time; the trace goes on from there, to a
      wrong end. The record's `answer` is the right one all the same.
    noise: the share of letters before the answer that are replaced by random others; the
      rest of the trace stays right.
    detours: so many at each step on average (`with_detours`).

  Raises:
    UserError: an unknown split, options out of range, or too few such problems.
  """
  common.check_split(split)
  steps = option_number("steps", steps, int, 1, 64)
  maps = option_number("maps", maps, int, 1, 10)
  table = option_number("table", table, int, 0, 2**31)
  shares = {"doubtful": doubtful, "slips": slips, "noise": noise}
  doubtful, slips, noise = (option_number(k, v, float, 0, 1) for k, v in shares.items())
  detours = option_number("detours", detours, float, 0, 10)

  right, wrong = tables(table, maps), wrong_targets(table, maps, doubtful)
  rng = np.random.default_rng([seed, table, steps, maps])
  writing = np.random.default_rng([seed, table, 1])  # of the traces: problems do not hang on it
  records: dict[str, Record] = {}
  for _ in range(100 * n + 1000):
    if len(records) == n:
      break
    start = int(rng.integers(len(LETTERS)))
    applied = rng.integers(maps, size=steps)
    problem = LETTERS[start] + "".join(map(str, applied))
    *before, answer = common.walk(right, start, applied)
    if problem in records or answer in before or split_of(problem) != split:
      continue
    written = common.walk(right, start, applied, wrong, slips, writing)
    for step in range(steps - 1):
      if noise and writing.random() < noise:
        others = [i for i in range(len(LETTERS)) if i not in (written[step], answer)]
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
