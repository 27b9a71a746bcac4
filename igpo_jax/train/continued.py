"""The options that may differ when a run is continued: those that do not change what is learned.

Options are named with dots, such as "rl.micro_batches". Some may differ under a condition only; a
message of refusal names the condition.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from igpo_jax.config import Config
from igpo_jax.errors import UserError

# Sections and single options: how a run is split, displayed, saved and evaluated.
FREE = (
  "stages", "arms", "log", "mesh", "checkpoint", "compilation_cache",
  "rl.micro_batches", "rl.sample_slices", "rl.eval_every", "sft.micro_batches", "sft.eval_every",
  "eval.batch_size", "reward.workers", "reward.timeout",
  "model.attention", "model.remat", "model.shard_sequence",
)  # fmt: skip
# The options that decide the model, which must not differ where a workdir is only evaluated.
MODEL = ("model", "init_from")

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reached:
  """How far the run in a workdir has come.

  Attributes:
    done: stage -> step of its newest checkpoint, for stages that have one.
    begun: the stages that have a row or a checkpoint.
  """

  done: Mapping[str, int]
  begun: frozenset[str]


def changes(
  old: Options, new: Config, reached: Reached, workdir: epath.PathLike
) -> dict[str, tuple[Any, Any]]:
  """The options that differ between a run and its continuation: name -> (old, new).

  Args:
    old: contents of config.json in the workdir.
    new: the config with which the run is to be continued.
    reached: how far the run has come.
    workdir: the run's workdir, for messages.

  Raises:
    UserError: an option differs that changes what is learned.
  """
  only_eval = new.stages == ("eval",)
  differing = _differing(_filled(old, as_json(Config())), as_json(new))
  for name, (before, now) in differing.items():
    if only_eval and not _is_in(name, MODEL):
      continue
    if name in _CONDITIONS:
      reason = _CONDITIONS[name](before, now, old, new, reached)
    else:
      reason = None if _is_in(name, FREE) else "it decides what is learned"
    if reason:
      raise UserError(
        f"{workdir} holds a run with another config.{name}: {before} there, {now} now "
        f"({reason}); choose another --workdir, or the same settings"
      )
  return differing


def as_json(config: Config) -> Options:
  """The config as it is after being written as JSON and read again."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(options: Options, prefix: str = "") -> dict[str, Any]:
  """Nested options by dotted names: flat({"rl": {"steps": 3}}) == {"rl.steps": 3}."""
  out = {}
  for name, value in options.items():
    inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else None
    out |= {f"{prefix}{name}": value} if inner is None else inner
  return out


def _differing(old: Options, new: Options) -> dict[str, tuple[Any, Any]]:
  """The options that differ: name -> (old, new). Options of `old` only are of another version."""
  before, now = flat(old), flat(new)
  return {n: (before.get(n), v) for n, v in now.items() if before.get(n) != v}


def _filled(old: Any, defaults: Any) -> Any:
  """The old options, with defaults for options that did not exist yet."""
  if not (isinstance(old, dict) and isinstance(defaults, dict)):
    return old
  return {**defaults, **{n: _filled(v, defaults.get(n)) for n, v in old.items()}}


def _is_in(name: str, names: tuple[str, ...]) -> bool:
  return any(name == other or name.startswith(f"{other}.") for other in names)


# --- options that may differ under a condition ------------------------------------------------
# (before, now, the old options, the new config, how far the run has come) -> the reason to refuse.


def _stages(before: Any, now: Any, old: Options, new: Config, reached: Reached) -> str | None:
  del before, now, old
  if "rl" in new.stages and "sft" in reached.begun and "sft" not in new.stages:
    return "it began with SFT, and RL would start from other weights; a finished stage is not rerun"
  if "sft" in new.stages and "rl" in reached.begun and "sft" not in reached.begun:
    return "its RL began without SFT"
  return None


def _steps(stage: str) -> Callable[..., str | None]:
  def condition(before, now, old: Options, new: Config, reached: Reached) -> str | None:
    del before
    schedule = getattr(new, f"{stage}_optimizer").schedule
    if schedule != "constant":
      return f"it decides the learning rates: {stage}_optimizer.schedule={schedule!r}"
    if stage == "sft" and "rl" in reached.begun:
      return "RL has begun with what SFT ended with"
    done = reached.done.get(stage, 0)
    if isinstance(now, int) and now < done and not (stage == "sft" and new.sft.epochs):
      return f"{done} steps are done"
    return None

  return condition


def _buckets(before: Any, now: Any, old: Options, new: Config, reached: Reached) -> str | None:
  del old, reached
  if not isinstance(before, list) or not before or before[-1] != now[-1]:
    return "the longest bucket decides which records are used"
  if "sft" in new.stages and len(new.sft.response_lengths) > 1:
    return "with several sft.response_lengths it decides the order of the records"
  return _rows_together(before, now, {}, new, Reached({}, frozenset()))


def _rows_together(
  before: Any, now: Any, old: Options, new: Config, reached: Reached
) -> str | None:
  del before, now, old, reached
  if new.sampler.early_stop == "batch":
    return "with sampler.early_stop='batch' rows depend on those sampled with them"
  return None


def _best(before: Any, now: Any, old: Options, new: Config, reached: Reached) -> str | None:
  del before, now, old
  if "sft" in reached.begun and new.sft.select == "best":
    return "with sft.select='best' it decides which parameters the next stage gets"
  return None


_CONDITIONS: dict[str, Callable[..., str | None]] = {
  "stages": _stages,
  "rl.steps": _steps("rl"),
  "sft.steps": _steps("sft"),
  "sft.epochs": _steps("sft"),
  "data.prompt_buckets": _buckets,
  "rl.sample_slices": _rows_together,
  "eval.batch_size": _rows_together,
  "checkpoint.best_metric": _best,
  "sft.eval_every": _best,
}
