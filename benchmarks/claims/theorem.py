"""Claim 11: the size of the expected gradient as a function of the share of correct completions.

Let K of the G completions of a group be replaced by correct ones, and rho = K / G. Theorem 1 of the
paper says that the expected gradient is rho (1 - rho) (g_correct - g_wrong), largest at rho = 1/2.
It is measured at the policy after SFT. For many prompts, a pool of the policy's own wrong
completions and a pool of correct inpainted completions are sampled. For each K, groups are drawn
from the pools at random, and the trainer's own program computes the gradient of the first update.

The norm of a mean over few groups is mostly noise. So the prompts are split into two halves, whose
noise is independent. The square root of the inner product of their mean gradients estimates the
norm of the expected gradient without the noise.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from igpo_jax.checkpoint import Checkpoints
from igpo_jax.config import Config
from igpo_jax.data.pipeline import PromptStream
from igpo_jax.diffusion.completions import prompt_keys
from igpo_jax.hints.inject import hinted_group
from igpo_jax.parallel.mesh import configured_mesh
from igpo_jax.rewards.score import Scorer
from igpo_jax.rl.advantages import group_advantages
from igpo_jax.rl.sampling import DeviceClock, GroupSampler
from igpo_jax.train.policy_update import make_policy_programs
from igpo_jax.train.setup import load_source, make_model, make_optimizer, make_tokenizer
from igpo_jax.train.setup import purpose_key as key_of
from igpo_jax.types import Rollout

PROMPTS, POOLS, DRAWS = 64, 6, 12  # prompts per half; groups sampled per pool; random regroupings


def measure(config: Config, sft_workdir: epath.Path, smoke: bool) -> dict:
  """Measures the gradients.

  Args:
    config: of the arm "igpo".
    sft_workdir: of the SFT run whose policy is measured.
    smoke: whether to use few prompts, for a test.

  Returns:
    Lists over K = 1 .. G - 1: "rho", "norm" (measured) and "predicted" (rho (1 - rho), scaled by
    least squares); and "prompts", how many prompts have both pools.
  """
  half, pools, draws = (2, 2, 1) if smoke else (PROMPTS, POOLS, DRAWS)
  rl = dataclasses.replace(config.rl, prompts_per_step=half)
  config = dataclasses.replace(config, rl=rl)
  mesh = configured_mesh(config.mesh)
  with jax.set_mesh(mesh), Scorer(config.reward.verifier) as scorer:
    tokenizer = make_tokenizer(config, sft_workdir)
    model = make_model(config, tokenizer, mesh)
    checkpoints = Checkpoints(sft_workdir / "checkpoints" / "sft", config.checkpoint.keep)
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model.params
    )
    params = checkpoints.restore_part(checkpoints.latest(), {"params": like})["params"]
    checkpoints.close()
    programs = make_policy_programs(model.lm, make_optimizer(config.rl_optimizer, 1), config)
    sampler = GroupSampler(model.lm, tokenizer, scorer, config, mesh)
    stream = PromptStream(
      load_source(config.data.rl), tokenizer, half, config.data.prompt_buckets, config.seed
    )
    sums, used = [], 0
    for part in range(2):
      pool = _Pools(config, model.lm, sampler, stream.batch(part), params, pools, part)
      used += int(pool.usable.sum())
      sums.append([_gradient(config, programs, pool, params, k, draws)
                   for k in range(1, config.rl.group_size)])  # fmt: skip
  g = config.rl.group_size
  rho = np.arange(1, g) / g
  norm = np.array([_shared_size(a, b) for a, b in zip(*sums, strict=True)])
  shape = rho * (1 - rho)
  scale = float(shape @ norm / (shape @ shape))  # least squares
  return {
    "rho": rho.tolist(),
    "norm": norm.tolist(),
    "predicted": (scale * shape).tolist(),
    "prompts": used,
  }


class _Pools:
  """Wrong completions of the policy, and correct inpainted ones, of each prompt of a batch."""

  def __init__(self, config, lm, sampler, batch, params, pools: int, part: int):
    g, length, p = config.rl.group_size, config.sampler.gen_length, len(batch.records)
    self.batch = batch
    self.rng = np.random.default_rng([config.seed, part])

    def sample(canvas, hinted, purpose, number):
      key = jax.random.fold_in(key_of(config.seed, part, purpose), number)
      return sampler(params, batch, np.arange(p), canvas, hinted, key, DeviceClock())

    blank = np.full((p, g, length), lm.mask_id, np.int32)
    rows = []
    for number in range(pools):
      rows.append(sample(blank, np.zeros(blank.shape, bool), "sample", number))
      hints = [
        hinted_group(trace, span, g, length, config.hints, self.rng, lm.mask_id)
        for trace, span in zip(batch.traces, batch.answer_spans, strict=True)
      ]
      canvas, hinted = (np.stack(x) for x in zip(*hints, strict=True))
      rows.append(sample(canvas, hinted, "resample", number))
    join = lambda name: np.concatenate([getattr(r, name) for r in rows], axis=1)
    self.completion, self.hinted, correct = join("completion"), join("hinted"), join("correct")
    inpainted = np.tile(np.repeat([False, True], g), pools)
    self.right = [np.flatnonzero(correct[i] & inpainted) for i in range(p)]
    self.wrong = [np.flatnonzero(~correct[i] & ~inpainted) for i in range(p)]
    # Completions may come twice in a group; there has to be one of each kind to take.
    self.usable = np.array([len(self.right[i]) > 0 and len(self.wrong[i]) > 0 for i in range(p)])

  def groups(self, k: int, g: int) -> Rollout:
    """Groups with k correct completions. Prompts that lack a pool have zero advantages."""
    p = len(self.right)
    rows = np.zeros((p, g), int)
    for i in np.flatnonzero(self.usable):
      rows[i] = [*self.rng.choice(self.right[i], k), *self.rng.choice(self.wrong[i], g - k)]
    rewards = (np.arange(g) < k) & self.usable[:, None]
    advantages = np.asarray(group_advantages(rewards.reshape(-1), g)).reshape(p, g)
    take = lambda x: np.take_along_axis(x, rows[..., None], axis=1)
    completion, hinted = take(self.completion), take(self.hinted)
    return Rollout(self.batch.tokens, self.batch.valid, completion, hinted,
                   np.zeros_like(completion), advantages)  # fmt: skip


def _gradient(config, programs, pools: _Pools, params, k: int, draws: int):
  """The mean gradient over usable prompts and regroupings, at the policy that sampled them."""
  total = None
  for draw in range(draws):
    rollout = jax.tree.map(jnp.asarray, pools.groups(k, config.rl.group_size))
    # Masks are equal for every K. The reference is the policy itself, so the KL has no gradient.
    keys = prompt_keys(key_of(config.seed, draw, "estimate"), jnp.asarray(pools.batch.row_id))
    scores = programs.score(params, params, rollout, keys)
    _, _, gradient = programs.gradient(params, {}, rollout, scores, keys, jnp.int32(0))
    total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
  share = max(pools.usable.mean(), 1e-9) * draws
  return jax.tree.map(lambda x: x / share, total)


def _shared_size(a, b) -> float:
  """sqrt(max(<a, b>, 0)) of two gradients whose noise is independent."""
  products = jax.tree.map(lambda x, y: jnp.vdot(x, y), a, b)
  return float(np.sqrt(max(sum(map(float, jax.tree.leaves(products))), 0.0)))
