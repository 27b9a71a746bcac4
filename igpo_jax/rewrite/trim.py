"""Rule-based trimming: a fallback that needs no language model, and is no substitute for one.

It only removes text. Reflections go, the last derivation and the answer stay, and a trace that is
still too long loses its first sentences. A trace that rambles in words that `REFLECTIONS` does not
know stays as it is. Rules for other languages or notations are registered by name; those of a task
belong to the task (`igpo_jax.tasks`).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable

from igpo_jax.data import spans
from igpo_jax.data.task_registry import Count, TrimRules, all_tasks, find_task
from igpo_jax.errors import UserError

_RULES: dict[str, TrimRules] = {}


def register_rules(name: str) -> Callable[[TrimRules], TrimRules]:
  """Decorator: `--rules=NAME` calls the function as `fn(trace, answer, count, max_tokens)`.

  `count(text)` is the number of tokens of a text. The function returns the trimmed trace, or "" for
  one that it cannot trim.
  """

  def register(function: TrimRules) -> TrimRules:
    _RULES[name] = function
    return function

  return register


def rule_names() -> list[str]:
  """All values of --rules: names registered here, and tasks that have rules."""
  return sorted([*_RULES, *(task.name for task in all_tasks() if task.trim)])


def rules(name: str) -> TrimRules:
  """The rules with this name, or those of the task with this name.

  Raises:
    UserError: there are none; the message lists all names.
  """
  task = find_task(name)
  found = _RULES.get(name) or (task.trim if task else None)
  if found is None:
    raise UserError(f"--rules: {name!r} is not one of {', '.join(rule_names())}")
  return found


# A sentence that begins so thinks about the solution instead of giving it.
_REFLECTIONS = (
  r"wait\b(?! times?\b| for\b)",
  r"(?:hmm+|hold on|hang on|oops|maybe|perhaps)\b",
  r"actually,? (?:no|wait|let me)\b",
  r"no,? (?:wait|that)\b",
  r"let me (?:think|see|check|double|verify|make sure|try|start|go back|look|confirm|pause)",
  r"let me re-?(?:check|read|think|consider|do|call)",
  r"let'?s (?:double|verify|see if|re-?(?:check|read|think|consider|do))",
  r"let'?s check (?:again|this|that|my|if)",
  r"(?:just )?to (?:double[- ]?check|be (?:safe|sure)|make sure|verify)\b",
  r"i (?:think|guess|wonder|suppose|believe|made a|may have|might have|am (?:not sure|confused))\b",
  r"i (?:need to (?:check|think|verify|re)|should (?:check|double|verify))",
  r"i'?m (?:not sure|confused)\b",
  r"(?:is|does) (?:that|this) (?:right|correct|make sense)",
  r"that (?:seems|looks|sounds|can'?t be|doesn'?t (?:seem|look|make))\b",
  r"(?:checking (?:again|my|this)\b|double[- ]check)",
  r"(?:interesting|strange|tricky)\b[.,!]",
)
REFLECTIONS = re.compile(
  r"(?:(?:okay|ok|alright|right|so|but|and|now|well|oh|ah)\b[\s,.!-]*)*"
  rf"(?:{'|'.join(_REFLECTIONS)})",
  re.IGNORECASE,
)
# After one of these a derivation begins anew.
RESTARTS = re.compile(
  r"\b(?:start(?:ing)? (?:over|again|afresh)|try (?:again|another|a different)"
  r"|another (?:way|approach)|redo (?:this|that|it|the)|from (?:scratch|the beginning))\b",
  re.IGNORECASE,
)
# A line that only names what follows: "### Solution 2", "**Final Answer**", "Step 3.", "---".
HEADINGS = re.compile(
  r"#+\s.*|(?:\*\*|__)[^*_]*(?:\*\*|__)[:.]?|[-*_=~\s]+"
  r"|\W*(?:(?:the|my|our|a|final|full|short|step|case|part|method|detailed)\s+)*"
  r"(?:answer|solution|result|conclusion|summary|explanation|proof|step|case|part|method|approach)"
  r"\s*(?:\d+|[ivx]+|[A-Z])?\s*\W*",
  re.IGNORECASE,
)
_THINK_TAGS = re.compile(r"</?think>")
# A sentence ends with its line, or with . ! ? and a space; "3.5", "e.g. x" and "Dr. X" go on.
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])(?<!\b[a-z]\.[a-z]\.)(?<!\b[A-Z][a-z]\.)\s+(?=[^a-z\s])")


def sentences(text: str) -> list[str]:
  """Sentences with the space after them: joined they are `text`. Formulas are not cut.

  Worked example: "a = 3.5. So\nb = 2. Done" gives ["a = 3.5. ", "So\n", "b = 2. ", "Done"].
  """
  out, start = [], 0
  for match in _SENTENCE_END.finditer(text):
    piece = text[start : match.end()]
    if piece.strip() and not _inside_formula(piece):
      out.append(piece)
      start = match.end()
  return [*out, text[start:]] if text[start:].strip() else out


def _inside_formula(piece: str) -> bool:
  plain = piece.replace(r"\$", "")
  return (
    (plain.count("$$") % 2 == 1)
    or (plain.replace("$$", "").count("$") % 2 == 1 and "\n" not in piece)
    or plain.count(r"\[") > plain.count(r"\]")
    or plain.count(r"\begin{") > plain.count(r"\end{")
  )


def split_ending(trace: str, answer: str) -> tuple[str, str]:
  """Splits a trace into (derivation, ending). The ending is the sentence that states the answer."""
  start, at = spans.final_statement(trace, answer), 0
  pieces = sentences(trace)
  if start is None:
    start = len(trace) - len(pieces[-1]) if pieces else len(trace)
  for piece in pieces:
    if at + len(piece) > start:
      break
    at += len(piece)
  return trace[:at], trace[at:]


def derives(sentence: str) -> bool:
  """Whether a sentence has a step of a derivation: it is not a heading, a line or a lead-in."""
  line = sentence.strip()
  plain = line.strip("*_# ").removeprefix("$").strip()
  if HEADINGS.fullmatch(line) or (plain.endswith(":") and not re.search(r"[=<>\\]", plain)):
    return False
  return bool(re.search(r"\d|\\[a-z]|=", plain)) or len(plain.split()) >= 5


def _without_thinking(trace: str, answer: str) -> str:
  """The text after the last </think>, if it has a derivation; else the whole trace."""
  after = trace.rpartition("</think>")[2].strip()
  if "</think>" in trace and any(map(derives, sentences(split_ending(after, answer)[0]))):
    return after
  return _THINK_TAGS.sub("", trace).strip()


@register_rules("english")
def trim(trace: str, answer: str, count: Count, max_tokens: int) -> str:
  """A shorter trace, made of sentences of the given one.

  1. Of a reasoning model's output, only the text after its thinking is kept.
  2. Only the text after the last new start is kept, if it has a derivation.
  3. Reflections are removed, and sentences that were there before.
  4. First sentences are removed until the trace fits; one sentence always stays.

  Args:
    trace: reasoning that ends with the answer.
    answer: the gold answer; it helps to find where the trace states it.
    count: `count(text)`, the number of tokens of a text.
    max_tokens: the largest number of tokens that is allowed.

  Returns:
    The trimmed trace. It is still too long if its last sentence and its ending are.
  """
  body, ending = split_ending(_without_thinking(trace, answer), answer)
  parts = sentences(body)
  last = max((k for k, part in enumerate(parts) if RESTARTS.search(part)), default=-1)
  if any(map(derives, parts[last + 1 :])):
    parts = parts[last + 1 :]
  kept: list[str] = []
  seen: set[str] = set()
  for part in parts:
    plain = " ".join(part.split()).lower()
    if plain not in seen and not REFLECTIONS.match(part.lstrip()):
      kept.append(part)
      seen.add(plain)
  text = lambda first: ("".join(kept[first:]) + ending).strip()
  fits = lambda first: count(text(first)) <= max_tokens
  return text(bisect.bisect_left(range(len(kept) - 1), True, key=fits))
