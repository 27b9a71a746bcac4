"""What a language model is asked when it rewrites a trace, and what it is told when it failed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from igpo_jax.data.records import Message, Record

SYSTEM = """\
You turn long solutions of mathematics problems into short ones. You are given a problem, a
long solution of it and its final answer. Write one concise solution that a careful reader can
check line by line.

- Keep the chain of reasoning that leads to the answer, in its order.
- Leave out false starts, second thoughts, repeated checks, and remarks about the thinking itself.
- Take short, rigorous steps: each line follows from the lines before it and shows the numbers or
  formulas it needs.
- Do not introduce results that the long solution does not use, unless a gap has to be closed.
- Write as the one who solves the problem. Never mention a given solution or a known answer.
- End with the final answer inside \\boxed{}, once, and write nothing after it.
- The whole text may have at most {max_tokens} tokens; about {words} words are safe."""

USER = """\
Problem:
{question}

Long solution:
{trace}

Final answer: {answer}

The concise solution:"""

AGAIN = "{complaint} Write the whole concise solution again, under the same rules."


class Attempt(NamedTuple):
  """A text that was not accepted, and what is wrong with it, in words for the model."""

  text: str
  complaint: str


def fill(template: str, **values: str) -> str:
  """The template with each {name} replaced; braces of TeX in it or in the values stay."""
  for name in values:
    template = template.replace("{" + name + "}", f"\x00{name}\x00")
  for name, value in values.items():
    template = template.replace(f"\x00{name}\x00", value)
  return template


def first_messages(record: Record, max_tokens: int) -> list[Message]:
  """The chat that asks for one trace to be rewritten.

  Args:
    record: problem, trace and gold answer are sent.
    max_tokens: the most tokens the result may have, by the tokenizer of the model that
      is to be trained; the writer counts otherwise, hence the number of words.
  """
  system = fill(SYSTEM, max_tokens=str(max_tokens), words=str(max(max_tokens // 2, 1)))
  user = fill(USER, question=record.question, trace=record.trace, answer=record.answer)
  return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def messages(record: Record, max_tokens: int, attempts: Sequence[Attempt] = ()) -> list[Message]:
  """`first_messages`, then what was answered and why it was not accepted."""
  out = first_messages(record, max_tokens)
  for attempt in attempts:
    out.append({"role": "assistant", "content": attempt.text or "(nothing)"})
    out.append({"role": "user", "content": fill(AGAIN, complaint=attempt.complaint)})
  return out


def digest() -> str:
  """Names the wording: results of another wording do not belong into the same output."""
  text = "\x00".join((SYSTEM, USER, AGAIN))
  return hashlib.blake2s(text.encode(), digest_size=8).hexdigest()
