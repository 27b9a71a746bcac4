"""Sample, grade, and inpaint where a whole group is wrong (docs/method.md#exploration).

This is the heart of IGPO, as a recipe. Sampling runs on the devices. Decoding, grading and making
hints run on the host. All hosts agree on what decides control flow: how many groups are hinted,
padded to a bucket.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from igpo_jax.config import Config
from igpo_jax.data.pipeline import PromptBatch
from igpo_jax.data.tokenizer import Tokenizer
from igpo_jax.hints.inject import hinted_group, visible_hints
from igpo_jax.hints.leak import overlapping_tokens, segments
from igpo_jax.parallel.mesh import over_processes, shard_rows
from igpo_jax.parallel.sharding import num_shards
from igpo_jax.rewards.registry import shown_spans
from igpo_jax.rewards.score import Scorer
from igpo_jax.rl.advantages import host_advantages
from igpo_jax.rl.methods import objective_of
from igpo_jax.rl.refill import choose, enough, first_live, has_advantage, join_tries
from igpo_jax.rl.rows import HINTED, RESAMPLED, Tries, sample_rows
from igpo_jax.rl.sampling import DeviceClock, GroupSampler, Samples, group_buckets
from igpo_jax.types import LM, Array, Params, Rollout


def most_replacements(replace_fraction: float, group_size: int) -> int:
  """floor(lambda G): how many completions of a group may be replaced at most."""
  return math.floor(replace_fraction * group_size + 1e-9)


def num_replacements(num_correct: int, replace_fraction: float, group_size: int) -> int:
  """K = min(#correct, floor(lambda G)): how many wrong completions of a group are replaced.

  Args:
    num_correct: how many of the group's inpainted completions are correct.
    replace_fraction: lambda, see `HintConfig`.
    group_size: G.

  Example: `num_replacements(5, 0.5, 8) == 4`.
  """
  return min(num_correct, most_replacements(replace_fraction, group_size))


@dataclasses.dataclass(frozen=True)
class Exploration:
  """What one step sampled, and what the update learns from.

  Attributes:
    rollout: the groups to learn from, on the devices.
    row_id: u32[P], ids of this process's prompts in `rollout`, see `PromptBatch`.
    numbers: i64[P], numbers of these groups among those of all processes, see `Tries.number_of`.
      With `rl.refill` another process may have sampled them.
    update_rollout: the part of `rollout` that is used in the update. It is all groups; or, with an
      objective for which a group without advantage adds no gradient, the groups with an advantage,
      filled up to one of a few static sizes.
    update_groups: i64[X], indices of the groups of `update_rollout` among this process's groups.
    metrics: means over all that was sampled, on all hosts.
    tries: all that was sampled on this host, in both tries.
    tokenizer: the policy's tokenizer.
  """

  rollout: Rollout
  row_id: np.ndarray
  numbers: np.ndarray
  update_rollout: Rollout
  update_groups: np.ndarray
  metrics: dict[str, float]
  tries: Tries
  tokenizer: Tokenizer

  @functools.cached_property
  def rows(self) -> list[dict[str, Any]]:
    """Rows for samples.jsonl, one for each completion of this host in both tries."""
    return sample_rows(self.tries, self.tokenizer)


def repeated_tokens(completion: np.ndarray, length: np.ndarray) -> tuple[int, int]:
  """Counts tokens that repeat the token before them. A collapsed policy repeats nearly all.

  Args:
    completion: i32[...,L].
    length: i32[...], tokens of each completion up to its first stop token, that included. Later
      tokens do not count.

  Returns:
    (number of tokens that are equal to the one before, number of tokens that have one before).
  """
  counted = np.arange(1, completion.shape[-1]) < length[..., None]
  same = completion[..., 1:] == completion[..., :-1]
  return int((same & counted).sum()), int(counted.sum())


class Explorer:
  """Makes rollouts, with one of three kinds of exploration (`rl.exploration`).

  "inpaint" is IGPO. "resample" samples the same groups again, as often, but without hints. "none"
  is GRPO: the update uses what was sampled at first.

  Args:
    lm: the model.
    tokenizer: its tokenizer.
    scorer: grades completions.
    config: the whole config.
    mesh: the device mesh.

  Raises:
    UserError: prompts, slices and devices do not fit each other.
  """

  def __init__(self, lm: LM, tokenizer: Tokenizer, scorer: Scorer, config: Config, mesh):
    self.lm, self.tokenizer, self.scorer = lm, tokenizer, scorer
    self.config, self.mesh = config, mesh
    self.objective = objective_of(config)
    self.group_sampler = GroupSampler(lm, tokenizer, scorer, config, mesh)
    ways, processes = num_shards("act_batch", mesh=mesh), jax.process_count()
    # Each micro-batch of the update has to divide over the devices as well.
    multiple = config.rl.micro_batches * max(1, ways // processes)
    self.update_sizes = group_buckets(config.rl.prompts_per_step // processes, multiple)

  def __call__(
    self,
    params: Params,
    batch: PromptBatch,
    step: int,
    keys: dict[str, Array],
    clock: DeviceClock | None = None,
    further: Sequence[Callable[[], PromptBatch]] = (),
  ) -> Exploration:
    """Explores one batch of prompts, or more of them until enough groups have an advantage.

    Every process has to call it at the same time, with its own prompts.

    Args:
      params: the policy's parameters, in the dtype of the computation.
      batch: this process's prompts.
      step: number of the step. The choice of chunks is seeded by it and the prompt's id.
      keys: the step's PRNG keys, "sample" for the first try and "resample" for the second.
      clock: counts the seconds in which the devices wait for this host.
      further: functions that make further batches of as many prompts. They are sampled one after
        another until enough groups have an advantage: as many as a batch has (rl/refill.py). The
        update learns from the first of these groups, in the order of the prompts. If they are
        fewer than a batch, the first other groups fill it up.
    """
    clock = clock or DeviceClock()
    tried = [self._explore(params, batch, step, keys, clock)]
    for take in further:
      if enough([tries for tries, _ in tried]):
        break
      tried.append(self._explore(params, take(), step, keys, clock))
    tries = join_tries([tries for tries, _ in tried], self.tokenizer.pad_id)
    mixed = Samples.join([mixed for _, mixed in tried])
    arrays = self._arrays(tries, mixed) | {"row_id": tries.batch.row_id}
    arrays, numbers = choose(arrays, len(tried))
    row_id = arrays.pop("row_id")

    # To the devices: all groups, and those of the update.
    live = self._groups_to_update(arrays["advantages"])
    rollout = update_rollout = Rollout(**shard_rows(self.mesh, arrays))
    if len(live) < len(row_id):
      update_rollout = Rollout(**shard_rows(self.mesh, {k: x[live] for k, x in arrays.items()}))
    metrics = self._metrics(tries, mixed)
    if further:
      filled = np.array([has_advantage(arrays["advantages"]).sum(), len(row_id)])
      filled, groups = over_processes(filled, np.sum)
      metrics |= {"refills": float(len(tried) - 1), "filled": float(filled / groups)}
    return Exploration(
      rollout, row_id, numbers, update_rollout, live, metrics, tries, self.tokenizer
    )

  def _explore(
    self,
    params: Params,
    batch: PromptBatch,
    step: int,
    keys: dict[str, Array],
    clock: DeviceClock,
  ) -> tuple[Tries, Samples]:
    """Explores one batch.

    Returns:
      (all that was sampled; the groups after inpainting, with inserted completions in place).
    """
    cfg = self.config
    g, length = cfg.rl.group_size, cfg.sampler.gen_length
    p = len(batch.records)

    # 1. Every prompt: a group of completions from the policy alone.
    blank = np.full((p, g, length), self.lm.mask_id, np.int32)
    unhinted = np.zeros((p, g, length), bool)
    own = self.group_sampler(params, batch, np.arange(p), blank, unhinted, keys["sample"], clock)

    # 2. All-wrong groups only: try again, with chunks of the trace in place.
    wrong = np.flatnonzero(~own.correct.any(axis=1))
    extra: Samples | None = None
    if cfg.rl.exploration != "none":
      most = int(over_processes(np.array(len(wrong)), np.max))
      if most:
        size = self.group_sampler.padded(most)
        # Padding groups are fixed everywhere, so there is nothing to denoise in them.
        groups = np.concatenate([wrong, np.zeros(size - len(wrong), int)])
        canvas = np.full((size, g, length), self.lm.mask_id, np.int32)
        hinted = np.zeros((size, g, length), bool)
        if cfg.rl.exploration == "inpaint":
          for row, group in enumerate(wrong.tolist()):
            canvas[row], hinted[row] = self._hints(batch, group, step)
        padding = np.arange(size) >= len(wrong)
        canvas[padding], hinted[padding] = self.lm.eos_id, True
        extra = self.group_sampler(params, batch, groups, canvas, hinted, keys["resample"], clock)

    # 3. Correct ones replace wrong originals, at most lambda G in a group.
    mixed = own.copy()
    source = np.full((p, g), -1)  # number of the extra completion in each place; -1: the original
    if extra is not None:
      for row, group in enumerate(wrong.tolist()):
        rng = np.random.default_rng([cfg.seed, step, int(batch.row_id[group]), 1])
        correct = rng.permutation(np.flatnonzero(extra.correct[row]))
        correct = correct[: num_replacements(len(correct), cfg.hints.replace_fraction, g)]
        for target, number in zip(rng.permutation(g).tolist(), correct.tolist(), strict=False):
          mixed.put(group, target, extra, row, number)
          source[group, target] = number

    advantages = self._advantages(mixed)
    shown = self._answer_shown(batch, extra, wrong)
    second = HINTED if cfg.rl.exploration == "inpaint" else RESAMPLED
    return Tries(batch, own, extra, wrong, second, source, advantages, shown), mixed

  def _hints(self, batch: PromptBatch, group: int, step: int):
    """Hinted canvases (i32[G,L], bool[G,L]) of one prompt, from its own random stream."""
    cfg = self.config
    record = batch.records[group]
    forbidden = []
    if cfg.hints.hide_answer_value:
      _, offsets = self.tokenizer.encode_with_offsets(record.trace)
      shown = shown_spans(record.trace, record, cfg.reward.verifier)
      forbidden = overlapping_tokens(shown, offsets)
    rng = np.random.default_rng([cfg.seed, step, int(batch.row_id[group]), 0])
    canvases = hinted_group(
      batch.traces[group], batch.answer_spans[group], cfg.rl.group_size,
      cfg.sampler.gen_length, cfg.hints, rng, self.lm.mask_id, forbidden,
    )  # fmt: skip
    if not self.lm.block_length:
      return canvases
    prompt_length = int(np.sum(batch.valid[group]))
    return visible_hints(*canvases, prompt_length, self.lm.block_length, self.lm.mask_id)

  def _advantages(self, samples: Samples) -> np.ndarray:
    """f32[P,G]; 0 in groups whose accuracy is outside rl.accuracy_low to rl.accuracy_high."""
    p, g = samples.reward.shape
    rl = self.config.rl
    advantages = host_advantages(samples.reward.reshape(-1), g, rl.advantage).reshape(p, g)
    accuracy = samples.correct.mean(axis=1, keepdims=True)
    inside = (accuracy >= rl.accuracy_low) & (accuracy <= rl.accuracy_high)
    return np.where(inside, advantages, np.float32(0))

  def _arrays(self, tries: Tries, samples: Samples) -> dict[str, np.ndarray]:
    """The arrays of this process's `Rollout`, on the host."""
    return {
      "prompt": tries.batch.tokens,
      "prompt_valid": tries.batch.valid,
      "completion": samples.completion,
      "hinted": samples.hinted,
      "commit_step": samples.commit_step,
      "commit_logp": samples.commit_logp,
      "advantages": tries.advantages,
    }

  def _groups_to_update(self, advantages: np.ndarray) -> np.ndarray:
    """Chooses the groups that go into the update.

    With some objectives a group whose advantages are all zero adds no gradient. Such groups are
    left out, except for those that fill X up to one of a few sizes, the same on every process.

    Args:
      advantages: f32[P,G].

    Returns:
      i64[X], indices of this process's groups, ascending.
    """
    if not self.objective.drops_zero_advantage:
      return np.arange(len(advantages))
    live = has_advantage(advantages)
    most = int(over_processes(np.array(live.sum()), np.max))
    return first_live(live, next(size for size in self.update_sizes if size >= most))

  def _answer_shown(self, batch, extra: Samples | None, wrong) -> np.ndarray:
    """bool[X,G]: whether a hinted canvas shows the answer's value in a run of hint tokens."""
    shown = np.zeros((len(wrong), self.config.rl.group_size), bool)
    if extra is None:
      return shown
    for row, group in enumerate(wrong):
      record, verifier = batch.records[group], self.config.reward.verifier
      canvases = zip(extra.completion[row], extra.hinted[row], strict=True)
      for k, (tokens, hinted) in enumerate(canvases):
        runs = [self.tokenizer.decode(tokens[a:b], stop=False) for a, b in segments(hinted)]
        shown[row, k] = any(shown_spans(run, record, verifier) for run in runs)
    return shown

  def _metrics(self, tries: Tries, mixed: Samples) -> dict[str, float]:
    """Shares and means over the rows of all processes."""
    batch, own, extra, wrong = tries.batch, tries.own, tries.extra, tries.wrong
    p, g = own.reward.shape
    stops = np.isin(own.completion, self.lm.stop_ids)
    length = np.where(stops.any(-1), stops.argmax(-1) + 1, own.completion.shape[-1])
    tried, extra_correct = 0, 0
    if extra is not None and len(wrong):
      tried = len(wrong) * g
      extra_correct = extra.correct[: len(wrong)].sum()
    status = [s for group in own.status for s in group]
    broken = (~own.finite).sum() + (0 if extra is None else (~extra.finite[: len(wrong)]).sum())
    sums = {  # name: (numerator, denominator)
      "reward": (own.reward.sum(), p * g),
      "accuracy": (own.correct.sum(), p * g),
      "reward_after": (mixed.reward.sum(), p * g),
      "all_wrong_before": (len(wrong), p),
      "all_wrong_after": ((~mixed.correct.any(axis=1)).sum(), p),
      "no_advantage": ((~has_advantage(tries.advantages)).sum(), p),
      "extra_correct": (extra_correct, tried),
      "answer_shown": (tries.shown.sum(), tried),
      "replaced": ((tries.source >= 0).sum(), p * g),
      "length": (length.sum(), p * g),
      "unparseable": (status.count("unparseable"), p * g),
      "timeout": (status.count("timeout"), p * g),
      "repeated": repeated_tokens(own.completion, length),
      "not_finite": (broken, p * g + tried),
      "no_trace": (sum(len(trace) == 0 for trace in batch.traces), p),
    }
    for task in batch.tasks if len(batch.tasks) > 1 else ():
      of = np.array([record.task == task for record in batch.records])
      groups = of.sum()
      sums |= {
        f"rl/{task}/reward": (own.reward[of].sum(), groups * g),
        f"rl/{task}/accuracy": (own.correct[of].sum(), groups * g),
        f"rl/{task}/all_wrong_before": (of[wrong].sum(), groups),
        f"rl/{task}/all_wrong_after": ((~mixed.correct[of].any(axis=1)).sum(), groups),
      }
    totals = over_processes(np.array(list(sums.values()), np.float64), np.sum)
    means = {name: (a / max(b, 1), b) for name, (a, b) in zip(sums, totals, strict=True)}
    # A task has no metrics in a step without prompts of it.
    return {name: float(mean) for name, (mean, b) in means.items() if b or "/" not in name}
