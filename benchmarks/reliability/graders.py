r"""Hostile completions through the grader of training, with its limits of time and memory.

A case is a batch of completions with golds that are made from the case's name and the seed. Of each
completion it is known whether it is right: near misses of the gold and noise are wrong; a control,
the gold itself behind noise, is right. Lost are wrong completions called correct, controls that
were missed, exceptions, and batches that took longer than their time-outs allow.
"""

from __future__ import annotations

import functools
import os
import pathlib
import random
import time
from collections.abc import Iterator

from etils import epath

from benchmarks.reliability.table import Campaign
from igpo_jax.data.records import Record
from igpo_jax.io.jsonl import Row
from igpo_jax.rewards import answers
from igpo_jax.rewards.score import Scorer

BATCH, BATCHES = 500, 200
TIMEOUT = 5.0  # seconds a comparison, as in training
SLACK = 60.0  # seconds that a batch may take besides its time-outs, on a busy machine
MEGABYTE = 1 << 20
KINDS = ("near", "soup", "corpus")


@functools.cache
def golds() -> tuple[str, ...]:
  """200 gold answers of all kinds, none of which noise is likely to hit."""
  draw = random.Random("golds")
  number = lambda: draw.randint(10_001, 9_999_999)
  root = lambda: draw.choice((2, 3, 5, 7, 11, 13))
  kinds = (
    lambda: str(number()),
    lambda: str(-number()),
    lambda: rf"\frac{{{2 * number() + 1}}}{{{2 ** draw.randint(3, 9)}}}",
    lambda: f"{number()}.{draw.randint(11, 97)}",
    lambda: rf"{number()}\sqrt{{{root()}}}",
    lambda: rf"\frac{{{number()}\pi}}{{{root()}}}",
    lambda: f"{number()}x^2+{number()}x-{number()}",
    lambda: f"({number()},{number()}]",
    lambda: f"({number()},{number()},{number()})",
    lambda: rf"\{{{number()},{number()}\}}",
    lambda: f"y={number()}x+{number()}",
    lambda: rf"\begin{{pmatrix}}{number()}&{number()}\\{number()}&{number()}\end{{pmatrix}}",
    lambda: rf"{number()}\text{{ cm}}^2",
    lambda: rf"{number()}\%",
    lambda: f"x>{number()}",
    lambda: rf"\text{{{draw.choice(('Monday', 'Ann', 'isosceles', 'even'))} {number()}}}",
    lambda: f"{number()}+{number()}i",
    lambda: rf"e^{{{number()}}}",
    lambda: rf"\log_2 {2 * number() + 1}",
    lambda: f"{number()}:{2 * number() + 1}",
  )
  return tuple(kinds[k % len(kinds)]() for k in range(200))


def near_misses(gold: str, draw: random.Random) -> list[str]:
  """Answers that look like the gold, or hold it, and are not equal to it."""
  end = gold.find("^2") if "cm" in gold else len(gold)  # the power of a unit does not count
  digits = [at for at, char in enumerate(gold[:end]) if char.isdigit() and char != "0"]
  at = draw.choice(digits)
  put = lambda text: gold[:at] + text + gold[at + 1 :]
  other = str((int(gold[at]) + draw.randint(1, 8) - 1) % 9 + 1)
  other = other if other != gold[at] else str(int(gold[at]) % 9 + 1)
  alike = draw.choice((0x660, 0x6F0, 0x966, 0xFF10, 0x1D7CE, 0x2460 - 1)) + int(gold[at])
  return [
    put(other),
    put(chr(alike)),
    put(gold[at] + draw.choice(("\0", "\a", "\u200b", "\u2060", "\ufeff", "\u202e", "\u00ad"))),
    put("\ud800" + gold[at]),
    put(gold[at] + "\u0301"),
    f"{gold} or {put(other)}" * ("x>" not in gold),  # the union may be the gold itself
    f"{put(other)}, {gold}, {draw.randint(2, 9)}",
    f"({gold})+{draw.randint(1, 9)}",
    f"{draw.randint(2, 9)}({gold})",
    f"not {gold}",
    rf"\frac{{{gold}}}{{0}}",
    rf"({gold})^{{{draw.randint(2, 9)}}}",
    "{" * 50 + gold + "}" * 50,
    f"{gold}!" * ("text" not in gold),  # "Monday!" is Monday
    rf"\neg({gold})",
    "",
  ]


# Name: size -> text. Sizes are chosen so that some are beyond every limit.
CORPUS = {
  "braces": lambda n: "{" * n,
  "closed": lambda n: "{" * n + "}" * n,
  "fractions": lambda n: r"\frac{1" * n + "}" * n,
  "roots": lambda n: r"\sqrt{" * n + "2" + "}" * n,
  "tower": lambda n: "^".join(["{9"] * min(n, 400)) + "}" * min(n, 400),
  "right tower": lambda n: "9" + "^9" * n,
  "factorials": lambda n: "9" + "!" * n,
  "sums": lambda n: r"\sum_{k=1}^{" * min(n, 30) + "9" + "}k" * min(n, 30),
  "digits": lambda n: "9" * n,
  "groups": lambda n: "1" + ",000" * n,
  "list": lambda n: ",".join("1" * n),
  "chain": lambda n: "=".join("5" * n),
  "bars": lambda n: "|" * n,
  "left": lambda n: r"\left(" * n,
  "text": lambda n: r"\text{" * n,
  "matrix": lambda n: r"\begin{pmatrix}" + "&".join("1" * n) + r"\end{pmatrix}",
  "nested matrices": lambda n: r"\begin{matrix}" * n,
  "words": lambda n: "a " * n,
  "letters": lambda n: "x" * n,
  "marks": lambda n: " *" * n,
  "dots": lambda n: "_." * n,
  "backslashes": lambda n: "\\" * n,
  "dollars": lambda n: "$" * n,
  "blanks": lambda n: " " * n,
  "lines": lambda n: "\n" * n,
  "NUL": lambda n: "\0" * n,
  "surrogates": lambda n: "\ud800" * n,
  "combining": lambda n: "a" + "\u0301" * n,
  "boxes": lambda n: r"\boxed{" * n,
  "empty boxes": lambda n: r"\boxed{}" * n,
  "boxes in a row": lambda n: r"\boxed{1}," * n,
  "tags": lambda n: "<answer>" * n,
  "hashes": lambda n: "#### " * n,
  "phrases": lambda n: "The answer is " * n,
  "headers": lambda n: "<|im_start" * n,
  "code": lambda n: '__import__("os").system("false")' * min(n, 40),
  "macro": lambda n: r"\def\a{\a\a}\a" * min(n, 100),
}
# What is evaluated until a limit stops it: few, since each costs its time-out.
SLOW = (
  r"\int_0^1 \sin(\frac{1}{x^9}) dx",
  r"\sum_{n=1}^{\infty} \frac{\sin n}{n}",
  r"\prod_{n=1}^{\infty} (1+\sin(n))",
  r"\lim_{x\to 0} \sin(\frac{1}{x})",
  r"\sum_{a=1}^{9999}\sum_{b=1}^{9999} ab",
)
PIECES = (
  *r"\{}()[]^_=,.;:+-*/%$ 0123456789abxyiEe<>&!|'\"#@~`",
  *(f"\\{name}" for name in "frac sqrt pm cup text left right infty pi sum int lim le in".split()),
  r"\begin{pmatrix}", r"\end{pmatrix}", r"\boxed{", "<answer>", "</answer>", "\u2212", "\u00d7",
  "\u00bd", "\uff11", "\u0663", "\u00b2", "\u221e", "\u2264", "\0", "\ud83d", "\u200b",
)  # fmt: skip


def wrapped(answer: str, draw: random.Random) -> str:
  """An answer in one of the places where it is looked for."""
  before = draw.choice(("", "So ", "\\boxed{} ", "<|im_start|>", "\n" * 9, "#### 1\n", "\\frac{"))
  forms = (
    rf"\boxed{{{answer}}}", rf"\boxed{{{answer}", f"<answer>{answer}</answer>", f"<answer>{answer}",
    f"#### {answer}", f"The answer is {answer}.", rf"\fbox{{{answer}}}", rf"$\boxed{{{answer}}}$",
    rf"<answer>\boxed{{{answer}}}</answer>", rf"\boxed{{\boxed{{{answer}}}}}",
  )  # fmt: skip
  return before + draw.choice(forms)


def completions(case: str, seed: int) -> Iterator[tuple[str, str, bool]]:
  """(gold, completion, whether it is right) of a batch."""
  kind = case.partition("/")[0]
  draw = random.Random(f"{case} {seed}")
  for number in range(BATCH):
    gold = draw.choice(golds())
    if number % 25 == 0:  # a control
      noise = draw.choice(("a b ", "\0", "= ", "$ ", "\ud800", "\u0301", "\\\\ ", "* "))
      yield gold, f"{noise * draw.randint(0, 2000)}\n\\boxed{{{gold}}}", True
    elif kind == "near":
      yield gold, wrapped(draw.choice(near_misses(gold, draw)), draw), False
    elif kind == "soup":
      yield gold, wrapped("".join(draw.choices(PIECES, k=draw.randint(0, 60))), draw), False
    else:
      name = draw.choice(list(CORPUS))
      size = MEGABYTE // 8 if number % 250 == 1 else draw.choice((3, 30, 60, 300, 1999, 2001))
      text = draw.choice(SLOW) if number == 2 and case.endswith("0") else CORPUS[name](size)
      yield gold, wrapped(text, draw), False


@functools.cache
def scorer() -> Scorer:
  """One for all batches, as in training: what leaks, leaks on."""
  return Scorer("math", timeout=TIMEOUT, rules=answers.DEFAULT_RULES)


def memory() -> dict[str, int]:
  """MiB resident: of this process, and of the grading server with its workers."""
  pool = scorer().pool
  assert pool is not None
  server = pool._process.pid
  children = pathlib.Path(f"/proc/{server}/task/{server}/children").read_text().split()
  of = lambda pid: int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
  page = os.sysconf("SC_PAGE_SIZE")
  return {
    "own_mib": of("self") * page >> 20,
    "workers_mib": sum(map(of, [server, *children])) * page >> 20,
  }


def attempt(case: str, seed: int, folder: epath.Path) -> Row:
  batch = list(completions(case, seed))
  records = [Record("r", ({"role": "user", "content": "?"},), "", gold) for gold, _, _ in batch]
  began, lost = time.monotonic(), []
  scores = scorer()([text for _, text, _ in batch], records)
  seconds = time.monotonic() - began
  late = scores.status.count("timeout")
  if seconds > SLACK + TIMEOUT * late:
    lost.append(f"{seconds:.0f} s, with {late} time-outs")
  for (gold, text, right), correct in zip(batch, scores.correct, strict=True):
    if bool(correct) != right:
      lost.append(f"{'missed' if right else 'called correct'}: gold {gold!r}, {text[-300:]!r}")
  counts = {status: scores.status.count(status) for status in ("ok", "unparseable", "timeout")}
  return {"tried": len(batch), "lost": lost, **counts, **memory()}


CAMPAIGN = Campaign(
  "graders",
  "hostile completions",
  lambda seed: (f"{KINDS[k % 3]}/{k}" for k in range(BATCHES)),
  attempt,
)
