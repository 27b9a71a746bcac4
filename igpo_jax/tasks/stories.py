"""Letter maps told in sentences: traces of 60 to 120 words, of which few carry the reasoning.

    prompt   mia starts at harbor . first red second blue ... sixth red .
    trace    first from harbor she takes the red bus and rides to mill . second at mill she boards
             the blue bus and leaves for castle . ... sixth near tower she finds the red bus and
             ends => garden

The network of bus lines is drawn once for a `table`: each line is a permutation of the stops. There
is nothing to compute, only to know where a line goes from a stop, one transition at a time, as in
`letter_maps` (its docstring says why). What is added is text. Of the thirteen words of a step,
eleven follow from the prompt and from what stands before; the model is soon sure of them. One word
says where the bus goes, and that has to be known; the one at which the phrasings part is free. So:

  * hints are of five to ten words, as in the paper, and show steps in part;
  * the entropy filter has something to choose from: most words of a hint teach nothing;
  * a step may be told in several ways, so that traces differ where the reasoning is the same.

The last stop is the answer. It stands nowhere in the trace or in the prompt before the answer, by
construction, so no hint can show it. All phrasings have the same number of words, with stops and
line at the same places: what a hint fixes is independent of how the steps before it were told.

Words are tokens (`words:stories`): no subwords, and a space between any two.
"""

from __future__ import annotations

import functools
import re

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
PEOPLE = {"mia": "she", "tom": "he", "ada": "she", "ben": "he",
          "eva": "she", "leo": "he", "ida": "she", "max": "he"}  # fmt: skip
ORDINALS = (
  "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
).split()
QUESTION = "{name} starts at {at} . {rides} ."
PHRASINGS = (
  "{nth} from {at} {she} takes the {line} bus and rides to {to} .",
  "{nth} at {at} {she} boards the {line} bus and leaves for {to} .",
  "{nth} near {at} {she} finds the {line} bus and gets to {to} .",
  "{nth} in {at} {she} enters the {line} bus , which reaches {to} .",
)
ENDING = "and ends => {to}"  # of the last step, in the place of its last five words
FACTS = (
  "{name} waits at {at} .",
  "{name} lives near {at} .",
  "the {line} bus waits .",
)
_FIXED = re.sub(r"\{\w+\}", " ", " ".join((*PHRASINGS, ENDING, *FACTS, QUESTION))).split()
WORDS = tuple(dict.fromkeys((*STOPS, *LINES, *PEOPLE, *PEOPLE.values(), *ORDINALS, *_FIXED)))


@functools.lru_cache(maxsize=64)
def network(table: int, lines: int, stops: int) -> np.ndarray:
  """i64[lines,stops]: `[k, i]` is where line k goes from stop i; each line is a permutation."""
  rng = np.random.default_rng([table, lines, stops])
  return common.permutations(rng, lines, stops)


@functools.lru_cache(maxsize=64)
def wrong_targets(
  table: int, lines: int, stops: int, doubtful: float
) -> dict[tuple[int, int], int]:
  """The doubtful transitions (line, stop), and the wrong stop that each is taken to."""
  rng = np.random.default_rng([table, lines, stops, round(doubtful * 1000)])
  return common.wrong_targets(network(table, lines, stops), doubtful, rng)


def without_filler(trace: str) -> str:
  """The stops of a trace, one short clause a step.

  Example: "first from mill she takes the red bus and rides to lake . second at lake she boards the
  red bus and ends => zoo" gives "first lake . second => zoo".
  """
  nth = "|".join(ORDINALS)
  return re.sub(rf"({nth}) (?:(?!{nth}\b)\S+ )*?(=> \S+|\S+ \.)", r"\1 \2", trace)


def make_records(
  split: str,
  n: int,
  seed: int = 0,
  steps: int | str = 6,
  lines: int | str = 3,
  stops: int | str = 24,
  table: int | str = 0,
  phrasings: int | str = len(PHRASINGS),
  distractors: int | str = 0,
  doubtful: float | str = 0.0,
  slips: float | str = 0.0,
  noise: float | str = 0.0,
) -> list[Record]:
  """Distinct problems of one split, the same on every machine.

  Args:
    split: "train" or "test".
    n: how many.
    seed: of the generator.
    steps: rides of a problem, up to 12: the knob of difficulty. A trace has 13 words for each,
      less one: 64 for 5 steps, 77 for 6, 116 for 9.
    lines: how many bus lines there are, 1 to 10. There are `stops` * `lines` ** `steps` problems,
      less those whose last stop is passed before.
    stops: how many stops there are, 12 to 48. An answer is right by luck once in so many tries.
    table: which network, and which transitions are doubtful.
    phrasings: in how many ways a step may be told, 1 to 4; which one is random at each step.
    distractors: facts in the prompt that have nothing to do with the question, 5 words each.
    doubtful: the share of transitions that the traces may take to a wrong stop.
    slips: with what probability they do, each time; the trace goes on from there, to a wrong end.
      The record's `answer` is the right one all the same.
    noise: the share of the stops before the answer that are replaced by random others; the rest
      of the trace stays right.

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
  shares = {"doubtful": doubtful, "slips": slips, "noise": noise}
  doubtful, slips, noise = (common.option_number(k, v, float, 0, 1) for k, v in shares.items())

  right, wrong = network(table, lines, count), wrong_targets(table, lines, count, doubtful)
  rng = np.random.default_rng([seed, table, steps, lines, count])
  writing = np.random.default_rng([seed, table, 1])  # of the traces: problems do not hang on it
  records: dict[str, Record] = {}
  for _ in range(100 * n + 1000):
    if len(records) == n:
      break
    start = int(rng.integers(count))
    taken = [int(k) for k in rng.integers(lines, size=steps)]
    name = list(PEOPLE)[rng.integers(len(PEOPLE))]
    facts = int(rng.integers(2**31))
    path = [start, *common.walk(right, start, taken)]
    answer = path[-1]
    key = " ".join([STOPS[start], *(LINES[k] for k in taken)])
    if key in records or answer in path[:-1] or common.split_of(key) != split:
      continue
    written = [start, *common.walk(right, start, taken, wrong, slips, writing)]
    if answer in written[:-1]:  # led astray, it would show the answer on its way
      written = path
    others = [i for i in range(count) if i != answer]
    trace = _told(name, written, taken, others, phrasings, noise, writing)
    rides = " ".join(f"{nth} {LINES[k]}" for nth, k in zip(ORDINALS, taken, strict=False))
    question = QUESTION.format(name=name, at=STOPS[start], rides=rides)
    if distractors:
      question = _distracted(question, name, others, distractors, np.random.default_rng(facts))
    records[key] = Record(
      id=key,
      prompt=({"role": "user", "content": question},),
      trace=trace,
      answer=STOPS[answer],
      answer_span=(trace.index("=>"), len(trace)),
      task=NAME,
    )
  if len(records) < n:
    raise common.too_few(n)
  return list(records.values())


def _told(
  name: str,
  written: list[int],
  taken: list[int],
  others: list[int],
  phrasings: int,
  noise: float,
  rng: np.random.Generator,
) -> str:
  """The trace that goes over the stops `written`, a sentence for each line that is taken.

  Args:
    others: the stops that noise puts in the place of one.
  """

  def stop(at: int) -> str:
    if noise and rng.random() < noise:
      wrong = [i for i in others if i != at]
      at = wrong[rng.integers(len(wrong))]
    return STOPS[at]

  sentences = []
  for step, (k, at, to) in enumerate(zip(taken, written[:-1], written[1:], strict=True)):
    phrase = PHRASINGS[rng.integers(phrasings)]
    last = step == len(taken) - 1
    if last:
      phrase = " ".join([*phrase.split()[: -len(ENDING.split()) - 1], ENDING])
    words = {"nth": ORDINALS[step], "she": PEOPLE[name], "line": LINES[k]}
    stops = {"at": stop(at), "to": STOPS[to] if last else stop(to)}
    sentences.append(phrase.format(**words, **stops))
  return " ".join(sentences)


def _distracted(
  question: str, name: str, places: list[int], distractors: int, rng: np.random.Generator
) -> str:
  """The question among facts about other people, stops (out of `places`) and buses."""
  others = [person for person in PEOPLE if person != name]
  sentences = [
    FACTS[rng.integers(len(FACTS))].format(
      name=others[rng.integers(len(others))],
      at=STOPS[places[rng.integers(len(places))]],
      line=LINES[rng.integers(len(LINES))],
    )
    for _ in range(distractors)
  ]
  sentences.insert(rng.integers(distractors + 1), question)
  return " ".join(sentences)


register_task(
  Task(
    NAME,
    verifier="exact",
    make_records=make_records,
    words=WORDS,
    trim=lambda trace, answer, count, max_tokens: without_filler(trace),
  )
)
