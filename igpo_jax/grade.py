"""Grades completions in a file: writes one verdict per line and prints the accuracy.

    python -m igpo_jax.grade --benchmark=math500 --generations=IN.jsonl --output=OUT.jsonl
    python -m igpo_jax.grade --verifier=NAME [--plugins=FILE.py] --generations=IN --output=OUT

Each line of IN is a JSON object with "question", "completion" and "answer". OUT has the same rows,
in the same order, with "correct", "extracted" and "status" (ok, unparseable, timeout) added. A
completion that is null counts as one without an answer. A verifier whose gold answer is more than
a text reads it from the field "gold", or from an "answer" that is a JSON object.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from igpo_jax import cli, plugins
from igpo_jax.config.fields import Count, Positive, meant, number
from igpo_jax.data.names import names_of, one_name
from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.io.text import read_values
from igpo_jax.outputs import output_file
from igpo_jax.rewards import answers, registry
from igpo_jax.rewards.registry import POOLED
from igpo_jax.rewards.score import Scorer

BENCHMARKS = ("gsm8k", "math500", "amc", "minerva")
BATCH = 1024  # rows that are graded together


def read_generations(path: pathlib.Path, verifier: str = POOLED) -> Iterator[tuple[dict, Record]]:
  """Yields `(row, record)` for each line of a file of generations.

  Args:
    path: a JSONL file.
    verifier: the verifier that will grade. "math" extracts the gold answer from texts such as
      "... #### 72"; for other verifiers the field "answer" is the gold answer.

  Raises:
    UserError: no such file, or a line that is not a row with the fields that are needed.
  """
  for where, row in read_values(epath.Path(path)):
    yield _row(row, where, verifier)


def _row(row: Any, where: str, verifier: str) -> tuple[dict, Record]:
  missing = [
    key
    for key in ("question", "completion", "answer")
    if not isinstance(row, dict) or key not in row
  ]
  if missing:
    raise UserError(f"{where}: no {missing[0]!r}; each line needs question, completion, answer")
  for key in ("question", "completion"):
    if key == "completion" and row[key] is None:
      continue  # nothing was generated: graded as a completion without an answer
    if not isinstance(row[key], str):
      raise UserError(f"{where}: {key!r} must be text, not {type(row[key]).__name__}")
  answer, gold = row["answer"], row.get("gold")
  if isinstance(answer, dict) and verifier != POOLED:
    answer, gold = json.dumps(answer), gold or answer
  try:
    text = _gold_text(answer, verifier)
  except ValueError as error:
    raise UserError(f"{where}: {error}") from error
  if not text and gold is None:
    raise UserError(f"{where}: 'answer' is empty: give the gold answer")
  prompt = ({"role": "user", "content": row["question"]},)
  task = row.get("task")
  task = task if isinstance(task, str) else ""
  return row, Record(where, prompt, "", text, task=task, gold=gold)


def _gold_text(answer: Any, verifier: str) -> str:
  """The gold answer in the form that the verifier expects.

  Raises:
    ValueError: the answer is neither text nor a finite number.
  """
  if isinstance(answer, str) and verifier != POOLED:
    return answer.strip()
  return answers.gold_answer(answer)


def grade(generations: pathlib.Path, output: epath.PathLike, scorer: Scorer) -> dict[str, int]:
  """Grades a file of generations and writes the verdicts.

  Args:
    generations: the JSONL file to read.
    output: the JSONL file to write.
    scorer: grades the completions.

  Returns:
    Numbers of rows: "rows", "correct", "ok", "unparseable" and "timeout". If every row of the input
    has a boolean "correct", also "agree": how many of these are equal to our verdicts.

  Raises:
    UserError: a row cannot be graded, there are no rows, or the output cannot be written.
  """
  counts: dict[str, int] = dict.fromkeys(
    ("rows", "correct", "ok", "unparseable", "timeout", "agree"), 0
  )
  labelled = True
  with output_file(output, source=generations) as file:
    rows = list(read_generations(generations, scorer.verifier))
    if not rows:
      raise UserError(f"--generations: {generations} has no rows, nothing to grade")
    for start in range(0, len(rows), BATCH):
      batch = rows[start : start + BATCH]
      scores = scorer(
        [row["completion"] or "" for row, _ in batch], [record for _, record in batch]
      )
      for at, (row, _) in enumerate(batch):
        correct, status = bool(scores.correct[at]), scores.status[at]
        labelled = labelled and isinstance(row.get("correct"), bool)
        counts["rows"] += 1
        counts["correct"] += correct
        counts["agree"] += row.get("correct") is correct
        counts[status] += 1
        graded = {**row, "correct": correct, "extracted": scores.extracted[at], "status": status}
        file.write(json.dumps(graded))
  if not labelled:
    del counts["agree"]
  return counts


def make_parser() -> cli.ArgumentParser:
  """The parser of this command's options."""
  parser = cli.ArgumentParser(prog="python -m igpo_jax.grade", description=__doc__.splitlines()[0])
  parser.add_argument(
    "--benchmark",
    choices=names_of(BENCHMARKS),
    help="the benchmark, graded by mathematical equality; give this or --verifier",
  )
  parser.add_argument(
    "--verifier",
    metavar="NAME",
    help=f"one of {', '.join(registry.verifier_names())}, one that a plug-in registers, or"
    f" {registry.BY_TASK}: each row by the verifier that its field 'task' names (default: math)",
  )
  plugins.add_argument(parser)
  parser.add_argument("--generations", required=True, type=pathlib.Path, help="JSONL to read")
  parser.add_argument("--output", required=True, help="JSONL to write")
  parser.add_argument(
    "--workers", type=number(Count), help="worker processes (default: one per core)"
  )
  parser.add_argument(
    "--timeout",
    type=number(Positive),
    default=5.0,
    help="seconds after which an answer has the status timeout (default: %(default)s)",
  )
  parser.add_argument(
    "--extraction",
    default=",".join(answers.DEFAULT_RULES),
    help="rules that find the answer, in order of preference: some of "
    f"{','.join(answers.RULES)} (default: %(default)s)",
  )
  return parser


def main(argv: list[str] | None = None) -> None:
  """Runs the command.

  Args:
    argv: the options; default: those of this process.

  Raises:
    UserError: an option or a file is wrong.
  """
  args = make_parser().parse_args(argv)
  plugins.load_files(args.plugins)
  if not (args.benchmark or args.verifier):
    raise UserError("give --benchmark or --verifier (see --help)")
  name = one_name(args.benchmark) if args.benchmark else args.verifier
  rules = tuple(args.extraction.split(","))
  for rule in rules:
    if rule not in answers.RULES:
      raise UserError(
        f"--extraction={args.extraction}: {rule!r} is not one of {', '.join(answers.RULES)}"
        f"{meant(rule, answers.RULES)}"
      )
  with Scorer(
    args.verifier or POOLED, workers=args.workers, timeout=args.timeout, rules=rules
  ) as scorer:
    counts = grade(args.generations, args.output, scorer)
  rows = counts["rows"]
  print(
    f"{name}: accuracy {counts['correct'] / rows:.4f} "
    f"({counts['correct']} of {rows}); ok {counts['ok']}, unparseable "
    f"{counts['unparseable']}, timeout {counts['timeout']}"
  )
  if "agree" in counts:
    print(
      f"agrees with the verdicts in {args.generations.name}: {counts['agree']} of {rows} "
      f"({counts['agree'] / rows:.4f})"
    )


if __name__ == "__main__":
  cli.run(main)
