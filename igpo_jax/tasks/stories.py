"""Letter maps told in sentences: traces of 40 to 70 words, few of which carry the reasoning.

    prompt   first red second blue ... eighth red , mia starts at harbor
    trace    first takes red to mill . second boards blue for castle . ...
             eighth takes red => garden

The network of bus lines is drawn once for each `table`: a line goes round through all stops, in an
order of its own. There is nothing to compute. As in `letter_maps` (its docstring says why), a model
has to know where each line goes from each stop. What this task adds is text. Of the six words of a
step, four follow from the prompt and from earlier words, and the model is soon sure of them. One
word says where the bus goes, and has to be known. One choice, of a phrasing, is free. So:

  * hints have five to ten words, as in the paper, and show parts of steps;
  * the entropy filter has something to choose from, since most words of a hint teach nothing;
  * a step may be told in several ways, so traces with the same reasoning differ. Traces may have
    a habitual phrasing, and the traces of hints another one than the policy has learnt.

The last stop is the answer. By construction it is nowhere in the trace before the answer, nor in
the prompt, so no hint can show it. All phrasings have the same number of words, with stops and line
at the same places. So what a hint fixes does not depend on how the steps before it were told. The
prompt ends with the first stop, so that every stop is six tokens behind the one before it, the
first and the last included: a small model finds it much sooner so (docs/LOG.md).

Tokens are whole words (`words:stories`), with a space between any two.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import numpy as np

from igpo_jax.data.records import Record
from igpo_jax.data.task_registry import Task, register_task
from igpo_jax.tasks import common

NAME = "stories"
STOPS = (
  "airport bakery bank beach bridge canal castle cave chapel cinema college docks dome farm ferry"
  " forest fort fountain garden gate hall harbor hill hospital hotel island lake library"
  " lighthouse market meadow mill mine museum opera palace park pier plaza quarry school stadium"
  " station temple tower tunnel valley zoo"
).split()
LINES = "red blue green yellow white black orange purple brown silver".split()
PEOPLE = "mia tom ada ben eva leo ida max".split()
ORDINALS = (
  "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
).split()
QUESTION = "{rides} , {name} starts at {at}"
PHRASINGS = (
  "{nth} takes {line} to {to} .",
  "{nth} boards {line} for {to} .",
  "{nth} finds {line} towards {to} .",
  "{nth} rides {line} until {to} .",
)
ENDING = "=> {to}"  # replaces the last three words of the last step
FACTS = (
  "{name} waits at {at} .",
  "{name} lives near {at} .",
  "the {line} bus waits .",
)
_FIXED = re.sub(r"\{\w+\}", " ", " ".join((*PHRASINGS, ENDING, *FACTS, QUESTION))).split()
WORDS = tuple(dict.fromkeys((*STOPS, *LINES, *PEOPLE, *ORDINALS, *_FIXED)))


@functools.lru_cache(maxsize=64)
def network(table: int, lines: int, stops: int) -> np.ndarray:
  """The bus lines i64[lines,stops]: line k goes from stop number i to stop number [k, i].

  Args:
    table: the seed that the lines are drawn from.
    lines, stops: how many there are. Each line goes through all stops before it returns to one.
  """
  rng = np.random.default_rng([table, lines, stops])
  orders = common.permutations(rng, lines, stops)
  goes_to = np.empty_like(orders)
  np.put_along_axis(goes_to, orders, np.roll(orders, -1, axis=1), axis=1)
  return goes_to


@functools.lru_cache(maxsize=64)
def wrong_targets(
  table: int, lines: int, stops: int, doubtful: float
) -> dict[tuple[int, int], int]:
  """The doubtful transitions of `network`, as {(line, stop): wrong stop}, all by number.

  Args:
    table, lines, stops: as for `network`.
    doubtful: the share of transitions that are doubtful.
  """
  rng = np.random.default_rng([table, lines, stops, round(doubtful * 1000)])
  return common.wrong_targets(network(table, lines, stops), doubtful, rng)


def without_filler(trace: str) -> str:
  """Shortens a trace to one clause for each step: its number and its stop.

  Example: "first takes red to lake . second boards red => zoo" gives "first lake . second => zoo".
  """
  nth = "|".join(ORDINALS)
  return re.sub(rf"({nth}) (?:(?!{nth}\b)\S+ )*?(=> \S+|\S+ \.)", r"\1 \2", trace)


class Style(NamedTuple):
  """How the steps of a trace are told.

  Attributes:
    phrasings: how many of `PHRASINGS` are used.
    habitual: the number of the habitual one, from 0 on.
    habit: the probability of it; else one of the `phrasings` is drawn.
  """

  phrasings: int
  habitual: int
  habit: float

  def draw(self, rng: np.random.Generator) -> int:
    """The number of the phrasing for the next step."""
    drawn = int(rng.integers(self.phrasings))  # always drawn: the habit moves no other draw
    return self.habitual if rng.random() < self.habit else drawn


def make_records(
  split: str,
  n: int,
  seed: int = 0,
  steps: int | str = 8,
  lines: int | str = 2,
  stops: int | str = 16,
  table: int | str = 0,
  phrasings: int | str = len(PHRASINGS),
  distractors: int | str = 0,
  doubtful: float | str = 0.0,
  slips: float | str = 0.0,
  noise: float | str = 0.0,
  habitual: int | str = 1,
  habit: float | str = 0.0,
  apart: int | str = 0,
  filler: int | str = 1,
) -> list[Record]:
  """Distinct problems of one split, the same on every machine.

  Args:
    split: "train" or "test".
    n: number of problems.
    seed: seed of the generator.
    steps: how many rides a problem has, 1 to 12. It decides the difficulty. A trace has 6 words
      for each step, less one in all: 47 for 8 steps, 71 for 12.
    lines: how many bus lines there are, 1 to 10. There are `stops` * `lines` ** `steps` problems,
      less those that pass their last stop earlier.
    stops: how many stops there are, 12 to 48. A guess is right once in this many tries.
    table: seed of the network, and of which transitions are doubtful.
    phrasings: how many ways of telling a step there are, 1 to 4. Each step draws one of them,
      unless it follows the habit.
    distractors: how many facts that have nothing to do with the question are in the prompt, 0 to 8,
      of 5 words each.
    doubtful: the share of transitions that traces may take to a wrong stop.
    slips: the probability that a trace does so, each time it takes such a transition. The trace
      goes on from there to a wrong answer. The record's `answer` is right all the same.
    noise: each stop before the answer is replaced by a random other one with this probability. The
      rest of the trace does not change.
    habitual: the phrasing that traces fall into, 1 to `phrasings`.
    habit: the probability that a step is told in it, and not in one that is drawn.
    apart: how many rides at the end belong to the answer's span, 0 to `steps`. No hint shows a word
      of that span. With 0 it is the answer alone, from "=>" on.
    filler: 0 shortens traces to the number and the stop of each step (`without_filler`). 1: not.

  Raises:
    UserError: an unknown split, options out of range, or too few such problems.
  """
  common.check_split(split)
  steps = common.option_number("steps", steps, int, 1, len(ORDINALS))
  lines = common.option_number("lines", lines, int, 1, len(LINES))
  count = common.option_number("stops", stops, int, 12, len(STOPS))
  table = common.option_number("table", table, int, 0, 2**31)
  phrasings = common.option_number("phrasings", phrasings, int, 1, len(PHRASINGS))
  distractors = common.option_number("distractors", distractors, int, 0, 8)
  habitual = common.option_number("habitual", habitual, int, 1, phrasings)
  apart = common.option_number("apart", apart, int, 0, steps)
  filler = common.option_number("filler", filler, int, 0, 1)
  shares = {"doubtful": doubtful, "slips": slips, "noise": noise, "habit": habit}
  doubtful, slips, noise, habit = (
    common.option_number(k, v, float, 0, 1) for k, v in shares.items()
  )
  style = Style(phrasings, habitual - 1, habit)

  right, wrong = network(table, lines, count), wrong_targets(table, lines, count, doubtful)
  rng = np.random.default_rng([seed, table, steps, lines, count])
  writing = np.random.default_rng([seed, table, 1])  # for traces only: it changes no problem
  records: dict[str, Record] = {}
  for _ in range(100 * n + 1000):
    if len(records) == n:
      break
    start = int(rng.integers(count))
    taken = [int(k) for k in rng.integers(lines, size=steps)]
    name = PEOPLE[rng.integers(len(PEOPLE))]
    facts = int(rng.integers(2**31))
    path = common.walk(right, start, taken)
    answer = path[-1]
    key = " ".join([STOPS[start], *(LINES[k] for k in taken)])
    if key in records or answer in (start, *path[:-1]) or common.split_of(key) != split:
      continue
    written = common.walk(right, start, taken, wrong, slips, writing)
    if answer in written[:-1]:  # the slips would lead past the answer, and so show it
      written = path
    others = [i for i in range(count) if i != answer]
    sentences = _told(written, taken, others, style, noise, writing)
    trace, last = " ".join(sentences), " ".join(sentences[steps - apart :])
    if not filler:
      trace, last = without_filler(trace), without_filler(last)
    rides = " ".join(f"{nth} {LINES[k]}" for nth, k in zip(ORDINALS, taken, strict=False))
    question = QUESTION.format(name=name, at=STOPS[start], rides=rides)
    if distractors:
      question = _distracted(question, name, others, distractors, np.random.default_rng(facts))
    records[key] = Record(
      id=key,
      prompt=({"role": "user", "content": question},),
      trace=trace,
      answer=STOPS[answer],
      answer_span=(len(trace) - len(last) if apart else trace.index("=>"), len(trace)),
      task=NAME,
    )
  if len(records) < n:
    raise common.too_few(n)
  return list(records.values())


def _told(
  written: list[int],
  taken: list[int],
  others: list[int],
  style: Style,
  noise: float,
  rng: np.random.Generator,
) -> list[str]:
  """Writes the sentences of a trace, one for each ride.

  Args:
    written: numbers of the stops that the rides lead to.
    taken: numbers of the lines.
    others: the stops out of which `noise` draws.
    style: how steps are told.
    noise: see `make_records`.
    rng: draws phrasings and noise.
  """

  def stop(at: int) -> str:
    if noise and rng.random() < noise:
      wrong = [i for i in others if i != at]
      at = wrong[rng.integers(len(wrong))]
    return STOPS[at]

  sentences = []
  for step, (k, to) in enumerate(zip(taken, written, strict=True)):
    phrase = PHRASINGS[style.draw(rng)]
    last = step == len(taken) - 1
    if last:
      phrase = " ".join([*phrase.split()[: -len(ENDING.split()) - 1], ENDING])
    words = {"nth": ORDINALS[step], "line": LINES[k], "to": STOPS[to] if last else stop(to)}
    sentences.append(phrase.format(**words))
  return sentences


def _distracted(
  question: str, name: str, places: list[int], distractors: int, rng: np.random.Generator
) -> str:
  """The question after facts about other people, buses and stops of `places`."""
  others = [person for person in PEOPLE if person != name]
  sentences = [
    FACTS[rng.integers(len(FACTS))].format(
      name=others[rng.integers(len(others))],
      at=STOPS[places[rng.integers(len(places))]],
      line=LINES[rng.integers(len(LINES))],
    )
    for _ in range(distractors)
  ]
  return " ".join([*sentences, question])


register_task(
  Task(
    NAME,
    verifier="exact",
    make_records=make_records,
    words=WORDS,
    trim=lambda trace, answer, count, max_tokens: without_filler(trace),
  )
)
