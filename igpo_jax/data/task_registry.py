"""Tasks by name: what belongs to a task, and how the rest of the package finds it.

The package's own tasks are in `igpo_jax.tasks`, one file each. Users register tasks of their own by
one call of `register_task` in a config file, or in a file given by `--plugins`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from igpo_jax.data.records import Record
from igpo_jax.errors import UserError
from igpo_jax.plugins import load_built_in

Count = Callable[[str], int]
TrimRules = Callable[[str, str, Count, int], str]


@dataclasses.dataclass(frozen=True)
class Task:
  """One task. Its name is the same wherever it is used.

  Attributes:
    name: the name in the source `synthetic:NAME`, the tokenizer `char:NAME` or `words:NAME`, the
      trim rules `--rules=NAME`, and `Record.task`.
    verifier: name of the verifier that grades its records if `reward.verifier` is "task".
    make_records: `make_records(split, n, seed, **options) -> records`, where `split` is "train" or
      "test" and the options are those of the source's URI. None for a task whose problems are read
      from files.
    alphabet: the characters of its texts, for the character tokenizer; "" if it has none.
    words: the words of its texts, for the word tokenizer; () if it has none.
    trim: `trim(trace, answer, count, max_tokens) -> trace`, which shortens a trace by rules.
      `count(text)` is the number of tokens of a text. "" means that the trace cannot be trimmed.
      None if the task has no rules.
    aliases: further names of the task.
  """

  name: str
  verifier: str
  make_records: Callable[..., Iterable[Record]] | None = None
  alphabet: str = ""
  words: tuple[str, ...] = ()
  trim: TrimRules | None = None
  aliases: tuple[str, ...] = ()


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
  """Registers a task under its name and its aliases, and returns it.

  Raises:
    ValueError: another task has one of these names.
  """
  load_built_in()
  for name in (task.name, *task.aliases):
    if find_task(name):
      raise ValueError(f"task {name!r} is already registered")
  _TASKS[task.name] = task
  return task


def find_task(name: str) -> Task | None:
  """The task with this name or alias; None if there is none."""
  load_built_in()
  return next((t for t in _TASKS.values() if name == t.name or name in t.aliases), None)


def all_tasks() -> list[Task]:
  """All tasks, the package's own included, sorted by name."""
  load_built_in()
  return sorted(_TASKS.values(), key=lambda task: task.name)


def task_with(attribute: str, name: str, asked: str) -> Task:
  """The task with this name, if it has what is needed of it.

  Args:
    attribute: the attribute that it must have, such as "make_records" or "words".
    name: name or alias of the task.
    asked: what the user wrote, which begins the error's message.

  Raises:
    UserError: no task with this attribute has this name; the message lists those there are.
  """
  task = find_task(name)
  if task is None or not getattr(task, attribute):
    known = ", ".join(t.name for t in all_tasks() if getattr(t, attribute))
    raise UserError(f"{asked}: no task {name!r}; known: {known}")
  return task
