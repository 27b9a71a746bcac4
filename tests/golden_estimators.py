"""Outputs of other papers' code against the estimators and objectives that training uses.

    python -m tests.golden_estimators DIR [--no-forward]

DIR has a folder for each method, with one `npz` a case. A case brings completions, masks,
log-probabilities of every view, advantages and options, and what the authors' code made of them.
From the stored masks the estimator makes its views (scored positions, weights), from the stored
log-probabilities the objective makes loss and gradient; with a model beside DIR (`../llada_tiny`,
else the tests' own copy) the same is done from the model's parameters on. One line a case says how
far each is off, relative to the largest where it is a gradient; the exit code is 0 if all is within
tolerance, 1 if not, 2 if DIR cannot be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from igpo_jax.convert.pretrained import load_pretrained
from igpo_jax.rl.advantages import group_advantages
from igpo_jax.rl.estimate import Estimate, read_views
from igpo_jax.rl.estimators.autoregressive import Autoregressive
from igpo_jax.rl.estimators.base import Estimator, Group, Sizes, Views
from igpo_jax.rl.estimators.block_random import BlockRandom
from igpo_jax.rl.estimators.coupled_grpo import CoupledGRPO
from igpo_jax.rl.estimators.elbo import Elbo, gauss_legendre, node_counts, stratified_counts
from igpo_jax.rl.estimators.every_block import EveryBlock
from igpo_jax.rl.estimators.prompt_masked import PromptMasked
from igpo_jax.rl.estimators.trace import Trace
from igpo_jax.rl.estimators.trace_sampled import TraceSampled, importance, step_shares
from igpo_jax.rl.objectives.base import Batch, Objective
from igpo_jax.rl.objectives.bgpo import BGPO
from igpo_jax.rl.objectives.clipped import Clipped
from igpo_jax.rl.objectives.elbo_ratio import ElboRatio
from igpo_jax.rl.objectives.gdsd import GDSD
from igpo_jax.rl.objectives.spg import SPG
from igpo_jax.rl.objectives.stabledrl import StableDRL
from igpo_jax.rl.objectives.trace_ppo import TracePPO
from igpo_jax.rl.objectives.wd1 import WD1

GOLDENS = pathlib.Path(__file__).resolve().parent / "goldens"

# Relative to max(|loss|, 1e-2): some losses are differences that cancel to nothing.
LOSS, SMALLEST = 1e-5, 1e-2
GRADIENT, WEIGHTS, ADVANTAGES, LOGP = 1e-5, 1e-5, 1e-5, 2e-4
# From the model's parameters on, in float32 against a float64 restatement.
FORWARD_LOSS = {"gdsd": 1e-4, "ebpo": 1e-4, "wd1": 1e-4, "coupled_grpo": 1e-4}
FORWARD_LOSS_ELSE, PARAMETERS = 1e-5, 1e-4

# What a case says of how it was made, and of what the arrays say themselves.
ABOUT = {"advantage", "perturb_old", "perturb_ref"}


class CaseError(Exception):
  """A case that cannot be understood."""


class Options:
  """A case's options. What is not asked for is an error: nothing is silently left out."""

  def __init__(self, options: dict[str, Any]):
    self._options, self._used = options, set(ABOUT)

  def __call__(self, name: str, default: Any = None) -> Any:
    self._used.add(name)
    if name not in self._options and default is None:
      raise CaseError(f"option {name!r} is missing")
    return self._options.get(name, default)

  def is_(self, name: str, *values: Any) -> None:
    """Holds an option that has one meaning only to it."""
    if name in self._options and self(name) not in values:
      raise CaseError(f"option {name}={self(name)!r}: only {', '.join(map(repr, values))} is known")
    self._used.add(name)

  def unused(self) -> set[str]:
    return set(self._options) - self._used


class Case:
  """The arrays of a file, prompt-major: [R,B,...] -> [P,R,G,...] and [B,...] -> [P,G,...]."""

  def __init__(self, path: pathlib.Path):
    with np.load(path, allow_pickle=False) as file:
      self.arrays = {name: file[name] for name in file.files}
    self.method = path.parent.name
    self.options = Options(json.loads(str(self.arrays["config"])))
    self.prompts, self.group, self.length = self.arrays["completion_ids"].shape

  def __contains__(self, name: str) -> bool:
    return name in self.arrays

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self.arrays:
      raise CaseError(f"array {name!r} is missing")
    return self.arrays[name]

  def rows(self, name: str) -> np.ndarray:
    """[B,...] -> [P,G,...]."""
    x = self[name]
    return x.reshape(-1, self.group, *x.shape[1:])

  def views(self, name: str) -> np.ndarray:
    """[R,B,...] -> [P,R,G,...]."""
    return by_view(self[name], self.group)


def by_view(x: np.ndarray, group: int) -> np.ndarray:
  """[R,B,...] -> [P,R,G,...]."""
  return np.moveaxis(x.reshape(x.shape[0], -1, group, *x.shape[2:]), 1, 0)


@dataclasses.dataclass
class Method:
  """One method with the options of one case.

  Attributes:
    estimator, objective: as a config would name them.
    views: (estimator's method on one group's stored masks) the arrays [P,...] it is mapped over.
    whole_canvas: the loss region is the canvas, and not through the first end-of-text.
    sizes: static numbers, if they follow from the options.
    scored_past_the_end: stored `scored` and weights go beyond the loss region.
    weights_per_draw: stored weights are of each draw alone; ours of their mean.
    counted: what the stored `scored` is, if an objective filters what the estimator scores.
    facts: further numbers that must be equal: (name, ours, stored).
    loss, gradient, logp: names of the arrays to compare with.
    on_policy: the old policy is the current one.
    old: views that the old policy was read under, if they are its own.
    old_logp: name of the array.
  """

  estimator: Estimator
  objective: Objective
  views: Callable[[Group], Views]
  whole_canvas: bool = False
  sizes: Sizes | None = None
  scored_past_the_end: bool = False
  weights_per_draw: bool = False
  counted: bool = False
  facts: tuple[tuple[str, Any, Any], ...] = ()
  loss: str = "loss"
  gradient: str = "grad_logp"
  norm: str = "grad_norm"
  logp: str = "logp"
  on_policy: bool = False
  old: Callable[[Group], Views] | None = None
  old_logp: str = "old_logp"
  variant: str = ""
  prompts: int = 0  # the first few only; 0: all


# --- the methods ----------------------------------------------------------------------


def mapped(fn: Callable, *arrays) -> Callable[[Group], Views]:
  """Views of all groups from `fn(group, *arrays of the group)`."""
  return lambda groups: jax.vmap(fn)(groups, *(jnp.asarray(x) for x in arrays))


def fixed(estimator: Estimator, sizes: Sizes) -> Callable[[Group], Views]:
  """Views of an estimator that draws nothing."""
  key = jax.random.key(0)
  return lambda groups: jax.vmap(lambda group: estimator.views(group, key, sizes))(groups)


def range_of(c: Options) -> dict[str, float]:
  eps = c("eps", 0.0)
  return {"eps_low": c("eps_low", eps), "eps_high": c("eps_high", eps)}


def coupled_grpo(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("iteration", c("iteration", 0))
  c.is_("num_iterations", c("num_iterations", 2))
  ratio = jnp.full(case.prompts, c("mask_ratio"))
  estimator = CoupledGRPO()
  yield Method(
    estimator,
    Clipped(ratio="token", normalize="token", beta=c("beta"), entropy_keep=1.0, **range_of(c)),
    mapped(lambda group, m, r: estimator.of_masks(m[1], r), case.views("masked"), ratio),
    scored_past_the_end=True,
  )


def tracerl(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("kl", "k3 to old, summed over the scored tokens of a view")
  estimator = Trace(shrink=c("shrink"), hints="context", end_tokens=c("post_num"))
  sizes = sizes._replace(steps=case["masked"].shape[0] * c("shrink"))
  used = case["scored"].any(axis=-1)
  objective = TracePPO(reduce="view", beta=c("beta"), kl_to="old", kl_sum=True, **range_of(c))
  facts = (("views", c("num_views"), used.sum()), ("used views", case["view_used"], used))
  views = fixed(estimator, sizes)
  yield Method(estimator, objective, views, whole_canvas=True, facts=facts, sizes=sizes)


def cj_grpo(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("kl", 0)
  c.is_("loss_agg_mode", "token-mean")
  estimator = Trace(shrink=1, hints="context")
  sizes = sizes._replace(steps=c("steps"))
  options = {"beta": 0.0, "dual_clip": c("clip_ratio_c"), **range_of(c)}
  views = fixed(estimator, sizes)
  yield Method(estimator, TracePPO(reduce="step", **options), views, sizes=sizes)
  if "loss_paper" in case:
    paper = {"loss": "loss_paper", "gradient": "grad_logp_paper", "norm": "", "variant": "paper"}
    yield Method(estimator, TracePPO(reduce="row", **options), views, **paper)


def autoregressive(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("gain", 1)
  c.is_("temperature", 1)
  objective = TracePPO(reduce="valid_rows", beta=0.0, **range_of(c))
  valid = (("valid rows", c("valid_samples"), (case["advantages"] != 0).sum()),)
  estimator = Autoregressive()
  views = fixed(estimator, sizes)
  yield Method(estimator, objective, views, whole_canvas=True, facts=valid, on_policy=True)


def rldf(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("sample_temperature", c("sample_temperature", 1))
  one = c("num_iterations") == 1
  reduce = {"sample": "row_step", "token": "step"}[c("loss_norm")]
  estimator = TraceSampled(draws=c("mask_num"), steps="unsure", score="later", hints="context")
  objective = TracePPO(
    reduce=reduce, ratio="none" if one else "token", beta=c("beta"),
    threshold=c("low_prob_threshold"), **range_of(c),
  )  # fmt: skip
  views = mapped(lambda group, s: estimator.of_steps(s, group), case.views("sampled_step"))
  yield Method(estimator, objective, views, counted=True, on_policy=one)


def agrpo(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("beta", 0)
  c.is_("low_discrepancy", True, False)
  c.is_("num_generations", case.group)
  kind = c("importance_sampling")
  c.is_("importance_sampling", "uniform", "entropy")
  steps = sizes._replace(steps=c("sampling_steps")).steps
  estimator = TraceSampled(
    draws=c("mc_samples"), steps={"uniform": "even", "entropy": "surprisal"}[kind],
    temperature=c("temperature"), hints="context",
  )  # fmt: skip

  def of_group(group: Group, sampled, last, entropy) -> Views:
    if kind == "uniform":
      return estimator.of_steps(sampled, group)
    present = jnp.arange(steps) <= last[:, None]
    share = present / (last[:, None] + 1)
    every = jnp.ones(group.completion.shape, bool)
    drawn = step_shares(entropy, group.commit_step, present, every)
    return estimator.of_steps(sampled, group, importance(share, drawn, sampled))

  arrays = case.views("sampled_step"), case.rows("last_step"), case.rows("rollout_entropy")
  objective = TracePPO(reduce="draws", beta=0.0, **range_of(c))
  yield Method(estimator, objective, mapped(of_group, *arrays), whole_canvas=True)


def stratified(case: Case, length: int) -> tuple[tuple[str, Any, Any], ...]:
  """Counts of masks against the rule, over all rows of the file as the authors' code has it."""
  count = case["masked_count"]
  rows = count.shape[1]
  ours = np.array(stratified_counts(jnp.asarray(count[:, :1]), rows, length))
  # Where the rule ends in one half, rounding may go either way.
  tie = np.abs(np.arange(rows) * (length + 1) / rows % 1 - 0.5) < 1e-6
  return (("counts", np.where(tie, count, ours), count),)


def espo(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("iteration", c("iteration", 0))
  c.is_("num_iterations", c("num_iterations", 2))
  c.is_("kl", "k2")
  estimator = Elbo(draws=c("num_mc"))
  objective = ElboRatio(scale="canvas", beta=c("beta"), **range_of(c))
  views = mapped(lambda group, m: estimator.of_masks(m, group), case.views("masked"))
  facts = stratified(case, sizes.length)
  yield Method(estimator, objective, views, whole_canvas=True, facts=facts)


def gdpo(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("count", "max(1, floor(t_n |o|))")
  c.is_("beta", 0)
  estimator = Elbo(counts="gauss_legendre", draws=c("num_nodes"), complement=False)
  objective = ElboRatio(scale="none", row_weight="length", beta=0.0, **range_of(c))
  views = mapped(lambda group, m: estimator.of_masks(m, group), case.views("masked"))
  nodes, rule = gauss_legendre(estimator.draws)
  counts = np.array(node_counts(estimator.draws, sizes.length))[:, case["length"]]
  facts = (
    ("nodes", nodes.astype(np.float32), case["node_t"].astype(np.float32)),
    ("rule", rule.astype(np.float32), case["node_w"].astype(np.float32)),
    ("counts", counts, case["masked_count"]),
  )
  yield Method(estimator, objective, views, facts=facts)


def bgpo(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("loss_agg_mode", "token-mean")
  estimator = Elbo(counts="response", draws=c("mc_num"), complement=False)
  objective = BGPO(dual_clip=c("clip_ratio_c"), **range_of(c))
  views = mapped(lambda group, m: estimator.of_masks(m, group), case.views("masked"))
  yield Method(estimator, objective, views, weights_per_draw=True)


def ebpo(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("kl", "k2")
  origin = {"global": "prompt", "local": "completion"}[c("block_origin", "global")]
  estimator = EveryBlock(draws=c("N"), block_length=c("block_length"), origin=origin)
  objective = ElboRatio(scale="none", beta=c("kl_coef"), **range_of(c))
  views = mapped(lambda group, m: estimator.of_masks(m, group, sizes), case.views("masked"))
  yield Method(estimator, objective, views)


def gdsd(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("kl", "k2")
  weights = {"batchll": "none", "tlc": "inverse"}[c("kind")]
  estimator = Elbo(draws=c("num_mc"), weights=weights)
  objective = GDSD(psi=c("psi"), eps=c("eps"), beta=c("beta"))
  views = mapped(lambda group, m: estimator.of_masks(m, group), case.views("masked"))
  facts = stratified(case, sizes.length)
  options = {"whole_canvas": True, "weights_per_draw": True, "facts": facts}
  yield Method(estimator, objective, views, **options)


def block_random(case: Case, c: Options) -> tuple[BlockRandom, Callable]:
  c.is_("max_t", c("max_t", 1))
  c.is_("min_t", c("min_t", 0.0))
  estimator = BlockRandom(
    draws=c("num_t"), block_length=c("block_length"), hole_probability=c("p_mask_prompt")
  )
  of = lambda prefix: mapped(
    lambda group, m, q: estimator.of_masks(m, q, group),
    case.views(f"{prefix}masked"),
    case.views(f"{prefix}prompt_masked"),
  )
  return estimator, of


NEGATIVE = {"mix": "mix", "elbo": "lower", "eubo": "upper", "zero": "zero"}


def spg(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  estimator, of = block_random(case, c)
  main = c("logp_estimation").split()[0]
  for name, negative in NEGATIVE.items():
    if name != main and f"{name}/loss" not in case:
      continue
    objective = SPG(negative=negative, mix=c("mix_weight"), upper_beta=c("eubo_beta"))
    names = {}
    if name != main:
      arrays = {"loss": "loss", "gradient": "grad_logp", "norm": "grad_norm"}
      names = {key: f"{name}/{array}" for key, array in arrays.items()} | {"variant": name}
    yield Method(estimator, objective, of(""), **names)


def stabledrl(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("softmax", "over all rows given to the loss")
  estimator, of = block_random(case, c)
  objective = StableDRL(
    negative=NEGATIVE[c("logp_estimation").split()[0]], mix=c("mix_weight"),
    upper_beta=c("eubo_beta"), largest=c("ais_clip_iw"), old_masks="own",
  )  # fmt: skip
  yield Method(estimator, objective, of(""), old=of("old_"))


def wd1(case: Case, c: Options, sizes: Sizes) -> Iterator[Method]:
  c.is_("softmax", "over all rows of the batch given to compute_loss")
  estimator = PromptMasked(probability=c("p_mask_prompt"))
  of = lambda name: mapped(lambda group, q: estimator.of_masks(q[0], group), name)
  yield Method(estimator, WD1(softmax="batch"), of(case.views("prompt_masked")))
  if "group0/loss" in case:
    names = {"loss": "loss", "gradient": "grad_logp", "logp": "logp"}
    names = {key: f"group0/{array}" for key, array in names.items()}
    views = of(case.views("group0/prompt_masked"))
    for softmax in ("batch", "group"):
      yield Method(
        estimator, WD1(softmax=softmax), views, **names, norm="", prompts=1,
        variant=f"first group, {softmax}",
      )  # fmt: skip


METHODS = {
  "agrpo": agrpo,
  "bgpo": bgpo,
  "cj_grpo": cj_grpo,
  "coupled_grpo": coupled_grpo,
  "ebpo": ebpo,
  "espo": espo,
  "gdpo": gdpo,
  "gdsd": gdsd,
  "justgrpo": autoregressive,
  "rldf": rldf,
  "spg": spg,
  "stabledrl": stabledrl,
  "tracerl": tracerl,
  "wd1": wd1,
}

ADVANTAGE = {
  "r - group mean": {"kind": "mean"},
  "leave-one-out": {"kind": "leave_one_out"},
  "leave-one-out, not scaled": {"kind": "leave_one_out"},
  "z-score, population std": {"kind": "std", "eps": 0.0},
  "z-score, sample std + 1e-6": {"kind": "std_sample", "eps": 1e-6},
  "(r - mean) / (sample std + 1e-4)": {"kind": "std_sample", "eps": 1e-4},
  "(r - mean) / max(std + 1e-8, 0.01), sample std": {
    "kind": "std_sample",
    "eps": 1e-8,
    "floor": 0.01,
  },
}


# --- comparing ------------------------------------------------------------------------


def relative(ours, theirs) -> float:
  """The largest difference, relative to the largest number."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  if ours.shape != theirs.shape or not np.isfinite(ours).all():
    return float("inf")
  size = np.abs(theirs).max(initial=0)
  difference = np.abs(ours - theirs).max(initial=0)
  return float(difference / size) if size else float(difference)


def loss_error(ours, theirs) -> float:
  error = abs(float(ours) - float(theirs)) / max(abs(float(theirs)), SMALLEST)
  return error if np.isfinite(error) else float("inf")


def compare(case: Case, method: Method, model) -> dict[str, tuple[float, float]]:
  """name -> (error, tolerance) of one case."""
  prompts = method.prompts or case.prompts
  cut = lambda x: jnp.asarray(x[:prompts])
  config = model.config
  completion = cut(case["completion_ids"])
  ends = completion == config.eos_id
  through = jnp.cumsum(ends, axis=-1) - ends == 0
  groups = Group(
    prompt=cut(case["prompt_ids"]),
    prompt_valid=jnp.ones(case["prompt_ids"][:prompts].shape, bool),
    completion=completion,
    hinted=cut(case.rows("hinted")),
    commit_step=cut(case.rows("commit_step")),
    region=jnp.ones_like(through) if method.whole_canvas else through,
    length=jnp.sum(through, axis=-1),
  )
  views = jax.jit(method.views)(groups)
  batch = Batch(
    completion=completion, hinted=groups.hinted, commit_step=groups.commit_step,
    advantages=cut(case.rows("advantages")), region=groups.region, length=groups.length,
    views=views,
  )  # fmt: skip
  stored = lambda name: by_view(case[name], case.group)
  read = lambda x, of=views: Estimate(jnp.asarray(x), jnp.zeros(x.shape, jnp.float32), of)
  ref = read(stored("ref_logp")) if method.objective.needs_reference else None

  def loss_of(logp):
    policy = read(logp)
    old = None
    if method.objective.needs_old:
      old = read(jax.lax.stop_gradient(logp))
      if not method.on_policy:
        of = method.old(groups) if method.old else views
        old = read(stored(method.old_logp), of)
    kept = batch.region & policy.scored
    needs = getattr(method.objective, "totals_need_old", False)
    totals = method.objective.totals(batch, *((old,) if needs else ()))
    out = method.objective.sums(policy, old, ref, batch, totals, kept)
    return out.numerator if out.denominator is None else out.numerator / out.denominator

  errors = {}
  logp = stored(method.logp)
  value, gradient = jax.jit(jax.value_and_grad(loss_of))(logp)
  errors["loss"] = loss_error(value, case[method.loss]), LOSS
  expected = by_view(case[method.gradient], case.group)
  errors["gradient"] = relative(gradient, expected), GRADIENT
  if not method.prompts:
    errors |= view_errors(case, method, batch, stored)
    kind = ADVANTAGE.get(json.loads(str(case["config"]))["advantage"])
    if kind is None:
      raise CaseError("its advantage is not known")
    ours = group_advantages(case["rewards"], case.group, **kind)
    errors["advantages"] = relative(ours, case["advantages"]), ADVANTAGES
  if model.params is not None and not method.prompts and method.norm:
    errors |= forward_errors(case, method, model, groups, views, stored, loss_of)
  return errors


def view_errors(case: Case, method: Method, batch: Batch, stored) -> dict[str, tuple[float, float]]:
  """Masks, scored positions and weights, as stored."""
  views = batch.views
  # A view that scores nothing is not run: its masks are stored as none.
  run = stored("scored").any(axis=-1, keepdims=True)
  wrong = np.sum((np.asarray(views.masked) != stored("masked")) & run)
  scored = views.scored
  if not method.scored_past_the_end:
    scored &= batch.region[:, None]
  if method.counted:
    name = "logp" if method.on_policy else "old_logp"
    old = Estimate(jnp.asarray(stored(name)), jnp.zeros(scored.shape), views)
    scored = method.objective.counted(views, batch.region, old)
  wrong += np.sum(np.asarray(scored) != stored("scored"))
  for name in ("prompt_masked",):
    if name in case:
      wrong += np.sum(np.asarray(views.prompt_masked) != stored(name))
  for _, ours, theirs in method.facts:
    wrong += np.sum(np.asarray(ours) != np.asarray(theirs))
  weights = jnp.ones(scored.shape) if views.weights is None else views.weights
  weights = jnp.where(scored, weights, 0.0) * (views.draws if method.weights_per_draw else 1)
  return {
    "masks": (float(wrong), 0.0),
    "weights": (relative(weights, stored("weights")), WEIGHTS),
  }


def forward_errors(case, method, model, groups, views, stored, loss_of):
  """Log-probabilities, loss and gradients from the model's parameters on."""
  scored = np.asarray(views.scored)
  sizes = method.sizes or Sizes(case.group, case.length, 0, 0, 1, *model.ids)
  lm = model.lm
  if "sampling_mask_packed" in case:
    packed = case["sampling_mask_packed"]
    lm = among(lm, np.unpackbits(packed, axis=-1)[..., : lm.vocab_size].astype(bool))

  def from_params(params):
    policy = read_views(lm, params, method.estimator, groups, views, sizes)
    return loss_of(policy.logp), policy.logp

  (loss, logp), gradient = jax.jit(jax.value_and_grad(from_params, has_aux=True))(model.params)
  theirs = torch_names(gradient)
  errors = [relative(theirs[name.removeprefix("param_grad/")], case[name])
            for name in case.arrays if name.startswith("param_grad/")]  # fmt: skip
  norm = float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64)))
                           for x in jax.tree.leaves(gradient))))  # fmt: skip
  tolerance = FORWARD_LOSS.get(case.method, FORWARD_LOSS_ELSE)
  difference = np.abs(np.where(scored, np.asarray(logp) - stored(method.logp), 0))
  return {
    "logp": (float(difference.max()), LOGP),
    "loss from the model": (abs(float(loss) - float(case[method.loss])), tolerance),
    "parameters": (
      max([relative(norm, case[method.norm]), *(errors if not method.variant else [])]),
      PARAMETERS,
    ),
  }


def among(lm, kept: np.ndarray):
  """`lm` with logits of some tokens only, as a sampler that had cut its vocabulary saw them.

  Args:
    kept: bool[B,L,V], for the last L positions of each row.
  """

  def hidden(params, tokens, valid=None, **options):
    h, cache = lm.hidden(params, tokens, valid, **options)
    before = tokens.shape[1] - kept.shape[1]
    all_kept = np.pad(kept, ((0, 0), (before, 0), (0, 0)), constant_values=True)
    return jnp.concatenate([h, jnp.asarray(all_kept, h.dtype)], axis=-1), cache

  def head(params, x):
    h, kept = x[..., : -lm.vocab_size], x[..., -lm.vocab_size :]
    return jnp.where(kept > 0, lm.head(params, h), -1e30)

  return lm._replace(hidden=hidden, head=head)


def torch_names(params) -> dict[str, np.ndarray]:
  """Our parameters under the names and in the layout of the published checkpoints."""
  out = {
    "wte": params["wte"]["embedding"],
    "ln_f": params["ln_f"]["scale"],
    "ff_out": params["head"]["kernel"].T,
  }
  for name, leaves in params["blocks"].items():
    array = leaves.get("scale", leaves.get("kernel"))
    for layer in range(array.shape[0]):
      out[f"blocks.{layer}.{name}"] = array[layer] if "scale" in leaves else array[layer].T
  return {f"model.transformer.{k}.weight": np.asarray(v) for k, v in out.items()}


@dataclasses.dataclass
class Model:
  """The network that completions were sampled from; `params` None: it is not run."""

  lm: Any
  params: Any
  config: Any

  @property
  def ids(self) -> tuple[int, int, tuple[int, ...]]:
    return self.lm.mask_id, self.lm.eos_id, tuple(self.lm.stop_ids)


def load_model(directory: pathlib.Path, forward: bool) -> Model:
  beside = directory.resolve().parent / "llada_tiny"
  path = beside if beside.is_dir() else GOLDENS / "llada_tiny"
  loaded = load_pretrained(path, dtype="float32")
  return Model(loaded.lm, loaded.params if forward else None, loaded.config)


def check(directory: pathlib.Path, forward: bool = True, only: str = "") -> Iterator[tuple]:
  """(case, errors or a message, whether all is within tolerance) of every case below a folder."""
  model = load_model(directory, forward)
  for path in sorted(directory.glob("*/*.npz")):
    name = f"{path.parent.name}/{path.stem}"
    if only and only not in name:
      continue
    if path.parent.name not in METHODS:
      yield name, "there is no method of this name here", False
      continue
    try:
      case = Case(path)
      r, _, length = case["masked"].shape
      sizes = Sizes(case.group, length, r, length, 1, *model.ids)
      methods = list(METHODS[path.parent.name](case, case.options, sizes))
      if case.options.unused():
        raise CaseError(f"options that are not known: {', '.join(sorted(case.options.unused()))}")
      for method in methods:
        errors = compare(case, method, model)
        fine = all(error <= tolerance for error, tolerance in errors.values())
        yield f"{name} {method.variant}".strip(), errors, fine
    except (CaseError, KeyError, ValueError, TypeError) as error:
      yield name, f"{type(error).__name__}: {error}", False


def line(name: str, errors, fine: bool) -> str:
  """One case for the screen."""
  if isinstance(errors, str):
    return f"{name:36} FAILED  {errors}"
  parts = []
  for what, (error, tolerance) in errors.items():
    mark = "" if error <= tolerance else f" > {tolerance:.0e}!"
    number = f"{error:.0f} differ" if what == "masks" else f"{error:.1e}"
    parts.append(f"{what} {number}{mark}")
  return f"{name:36} {'ok' if fine else 'FAILED':7} {', '.join(parts)}"


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.golden_estimators",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("directory", type=pathlib.Path, metavar="DIR")
  parser.add_argument("--no-forward", action="store_true", help="do not run the model")
  parser.add_argument("--only", default="", help="cases whose METHOD/NAME contains this")
  flags = parser.parse_args(arguments)
  if not flags.directory.is_dir():
    print(f"golden_estimators: {flags.directory}: no such folder", file=sys.stderr)
    return 2
  count = failed = 0
  for name, errors, fine in check(flags.directory, not flags.no_forward, flags.only):
    print(line(name, errors, fine), flush=True)
    count, failed = count + 1, failed + (not fine)
  if not count:
    print(f"golden_estimators: {flags.directory}: no METHOD/*.npz in it", file=sys.stderr)
    return 2
  print(f"{count} cases, {failed} failed")
  return 1 if failed else 0


if __name__ == "__main__":
  with jax.default_matmul_precision("highest"):
    sys.exit(main())
