"""From a config to what a loop needs: tokenizer, model, optimizer, sharded state."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from igpo_jax.cli import say
from igpo_jax.config import (
  RUN_CHOOSES,
  WEIGHTS_FIX,
  Config,
  LoRAConfig,
  ModelConfig,
  OptimizerConfig,
)
from igpo_jax.convert.open import Source, open_source
from igpo_jax.convert.pretrained import check_tokenizer, laid_out, read_params
from igpo_jax.data.records import Record
from igpo_jax.data.sources import describe, load_records
from igpo_jax.data.tokenizer import (
  Tokenizer,
  has_tokenizer,
  load_tokenizer,
  open_tokenizer,
  train_sentencepiece,
)
from igpo_jax.errors import UserError
from igpo_jax.models import lora
from igpo_jax.ops.rounding import stochastic_round
from igpo_jax.parallel.distributed import agree, from_first
from igpo_jax.parallel.sharding import replicated
from igpo_jax.types import LM, Array, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Model:
  """A language model with its tokenizer and first parameters.

  Attributes:
    lm: pure functions.
    params: sharded over the mesh; with LoRA, the base and its adapters in one tree.
    shardings: NamedShardings, mirroring `params`.
    tokenizer: as saved in the workdir.
  """

  lm: LM
  params: Params
  shardings: Any
  tokenizer: Tokenizer


def load_source(uri: str, log: Any = None) -> list[Record]:
  """Reads the records of a source, and reports how many rows could not be used.

  Args:
    uri: see `data.sources.load_records`.
    log: prints a line; None reports nothing.

  Raises:
    UserError: they cannot be read, or processes have read different records.
  """
  records, dropped = load_records(uri)
  if jax.process_count() > 1:
    digest = hashlib.blake2s()
    for record in records:
      digest.update(repr(dataclasses.astuple(record)).encode())
    agree(f"what {uri} holds", [len(records), digest.hexdigest()])
  if any(dropped.values()) and log is not None:
    log(f"{uri}: {len(records)} records, left out: {describe(dropped)}")
  return records


def make_tokenizer(config: Config, workdir: epath.Path) -> Tokenizer:
  """The run's tokenizer: the one in the workdir if there is one, else as configured. A collective.

  "sentencepiece:N" trains N pieces on the sft source (or the rl source if there is none); any other
  value is for `open_tokenizer`. Process 0 makes the tokenizer and saves it in the workdir, where
  all processes read it. So a run keeps its tokenizer.

  Raises:
    UserError: there is no such tokenizer, or it does not fit the model of `init_from`.
  """
  kept = workdir / "tokenizer"
  from_first(lambda: None if has_tokenizer(kept) else _new_tokenizer(config).save(kept))
  return load_tokenizer(kept)


def peek_tokenizer(config: Config, workdir: epath.Path) -> Tokenizer:
  """The tokenizer that `make_tokenizer` would return, without writing anything."""
  kept = workdir / "tokenizer"
  return load_tokenizer(kept) if has_tokenizer(kept) else _new_tokenizer(config)


def _new_tokenizer(config: Config) -> Tokenizer:
  spec, source = config.data.tokenizer, None
  if config.init_from:
    source = open_source(config.init_from)
    if spec == "char":
      spec = str(source.tokenizer or spec)  # the weights' own
  if spec.startswith("sentencepiece:"):
    size = spec.partition(":")[2]
    if not size.isdigit():
      raise UserError(f"config: data.tokenizer={spec!r}: give a number of pieces after the colon")
    uri = config.data.sft or config.data.rl
    records = load_records(uri).records
    texts = [text for record in records for text in (record.question, record.trace)]
    tokenizer = train_sentencepiece(texts, int(size), what=f"config: data.tokenizer={spec!r}: ")
  else:
    tokenizer = open_tokenizer(spec)
  if source is not None:  # before it is kept in the workdir
    check_tokenizer(tokenizer, source.config, _tokenizer_of(config))
  return tokenizer


def _tokenizer_of(config: Config) -> str:
  return f"config: data.tokenizer={config.data.tokenizer!r} with init_from={config.init_from}"


def with_lora(source: Source, asked: LoRAConfig) -> Source:
  """The weights that a run with `model.lora` = `asked` starts from.

  A source without adapters is returned as it is; the caller adds fresh adapters if any are asked
  for. If the source has adapters and none are asked for, they are merged into their kernels. If it
  has adapters and some are asked for, the run continues with them, so rank, alpha and targets have
  to be equal. The dropout may differ, since it belongs to the training.

  Raises:
    UserError: other adapters are asked for.
  """
  found = source.config.lora
  if not found.rank:
    return source
  if not asked.rank:
    return source.merged()
  tree: dict[str, Any] = {}
  for entry in source.entries:
    if entry.path[-1] == "kernel":
      tree = lora.combine(tree, _nested(entry.path, entry.shape))
  names = lambda cfg: sorted("/".join(path) for path in lora.find_targets(tree, cfg))
  here = {"rank": found.rank, "alpha": found.alpha, "targets": names(found)}
  there = {"rank": asked.rank, "alpha": asked.alpha, "targets": names(asked)}
  wrong = [name for name in here if here[name] != there[name]]
  if wrong:
    told = lambda cfg: ", ".join(f"model.lora.{name}={getattr(cfg, name)!r}" for name in wrong)
    raise UserError(
      f"config: {told(asked)}, but init_from={source.directory} has adapters with {told(found)}: "
      "give their values to go on with them, or model.lora.rank=0 to merge them and train "
      "every parameter"
    )
  return dataclasses.replace(source, config=dataclasses.replace(source.config, lora=asked))


def _nested(path: tuple[str, ...], leaf: Any) -> dict[str, Any]:
  for name in reversed(path):
    leaf = {name: leaf}
  return leaf


def make_model(config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Model:
  """The model to start from: `init_from`'s weights, or random ones from the seed.

  With `model.lora.rank` above 0 it has fresh adapters, unless the weights bring theirs
  (`with_lora`).

  Raises:
    UserError: a tokenizer of another model, other adapters than the weights have, or a mesh
      that the model does not divide over; all before any weight is read.
  """
  stop_ids = tuple(tokenizer.stop_ids)
  if not config.init_from:
    model_config = dataclasses.replace(
      config.model,
      vocab_size=config.model.vocab_size or tokenizer.vocab_size,
      mask_id=tokenizer.mask_id,
      eos_id=tokenizer.eos_id,
      stop_ids=stop_ids,
    )
    if model_config.vocab_size < tokenizer.vocab_size:
      raise UserError(
        f"config: model.vocab_size={model_config.vocab_size} is less than the "
        f"{tokenizer.vocab_size} tokens of the tokenizer; 0 takes their number"
      )
    lm, shardings = laid_out(model_config, mesh)
    params = jax.jit(lm.init, out_shardings=shardings)(jax.random.key(config.seed))
    return Model(lm, params, shardings, tokenizer)

  source = open_source(config.init_from)
  check_tokenizer(tokenizer, source.config, _tokenizer_of(config))
  source = with_lora(source, config.model.lora)
  brings_adapters = source.config.lora.rank > 0
  _tell_what_weights_fix(config.model, source)
  model_config = dataclasses.replace(
    source.config,
    stop_ids=tuple(dict.fromkeys((*source.config.stop_ids, *stop_ids))),
    **{name: getattr(config.model, name) for name in RUN_CHOOSES},
  )
  lm, shardings = laid_out(model_config, mesh)
  source.arrays.check()
  params = read_params(source, np.dtype(model_config.param_dtype), shardings)
  if model_config.lora.rank and not brings_adapters:
    fresh = jax.jit(lora.init, static_argnums=2, out_shardings=lora.split(shardings)[0])
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    params = lora.combine(params, fresh(params, key, model_config.lora))
  return Model(lm, params, shardings, tokenizer)


def _tell_what_weights_fix(asked: ModelConfig, source: Source) -> None:
  """Says which options of the config differ from the loaded weights, and so have no effect."""
  unset = ModelConfig()
  other = [
    f"model.{name}={getattr(asked, name)!r} (they have {getattr(source.config, name)!r})"
    for name in WEIGHTS_FIX
    if getattr(asked, name) not in (getattr(unset, name), getattr(source.config, name))
  ]
  if other and jax.process_index() == 0:
    say(f"config: the weights of init_from={source.directory} decide, not {', '.join(other)}")


def learning_rate(cfg: OptimizerConfig, total_updates: int) -> optax.Schedule:
  """The learning rate of each update: linear warm-up, then constant or decaying to 0.

  Args:
    cfg: see `OptimizerConfig`.
    total_updates: number of updates of the stage.
  """
  decay = max(total_updates - cfg.warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(cfg.learning_rate),
    "cosine": optax.cosine_decay_schedule(cfg.learning_rate, decay),
    "linear": optax.linear_schedule(cfg.learning_rate, 0.0, decay),
  }[cfg.schedule]
  if cfg.warmup_steps == 0:
    return after
  # The warm-up starts at the first step's share and not at 0, so that every update has an effect.
  warmup = optax.linear_schedule(
    cfg.learning_rate / cfg.warmup_steps, cfg.learning_rate, cfg.warmup_steps - 1
  )
  return optax.join_schedules([warmup, after], [cfg.warmup_steps])


def make_optimizer(cfg: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW with decoupled decay on every parameter.

  Decay covers norms and embeddings too, as torch's AdamW does over all parameters.
  """
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm),
    optax.adamw(
      learning_rate(cfg, total_updates),
      b1=cfg.b1,
      b2=cfg.b2,
      eps=cfg.eps,
      weight_decay=cfg.weight_decay,
    ),
  )


def state_shardings(
  optimizer: optax.GradientTransformation, params: Params, shardings: Any, mesh
) -> TrainState:
  """The shardings of a TrainState: those of optimizer moments are those of their parameters.

  Args:
    optimizer: the optimizer.
    params: the trained parameters, or their shapes.
    shardings: shardings of `params`.
    mesh: the device mesh.
  """
  opt_state = jax.eval_shape(optimizer.init, params)
  whole = replicated(mesh)
  opt_shardings = optax.tree_map_params(
    optimizer, lambda _, s: s, opt_state, shardings, transform_non_params=lambda _: whole
  )
  return TrainState(whole, shardings, opt_shardings, whole, whole)


def new_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
  """A TrainState of these parameters before the first update. It holds `params` themselves."""
  zero = lambda: jnp.zeros((), jnp.int32)
  return TrainState(zero(), params, optimizer.init(params), zero(), zero())


def make_state(
  optimizer: optax.GradientTransformation,
  params: Params,
  shardings: Any,
  mesh: jax.sharding.Mesh,
  donate: bool = False,
) -> TrainState:
  """A fresh TrainState with a copy of `params`, so that updates do not change them.

  Args:
    optimizer: the optimizer.
    params: the parameters to train.
    shardings: their shardings.
    mesh: the device mesh.
    donate: use the arrays of `params` themselves. The caller must not use them any more.
  """

  create = lambda params: new_state(optimizer, jax.tree.map(jnp.copy, params))
  out = state_shardings(optimizer, params, shardings, mesh)
  return jax.jit(create, out_shardings=out, donate_argnums=(0,) if donate else ())(params)


def start_state(
  model: Model,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  donate: bool = False,
) -> tuple[TrainState, Params]:
  """A fresh state of the trained parameters, and the parameters that are not trained.

  Args:
    model: the model to start from.
    optimizer: the optimizer.
    mesh: the device mesh.
    donate: use the trained arrays of `model.params` themselves, which must not be used any more.

  Returns:
    (state, frozen): under LoRA the adapters' state and the base; else that of all, and {}.
  """
  trainable, frozen = lora.split(model.params)
  state = make_state(optimizer, trainable, lora.split(model.shardings)[0], mesh, donate)
  return state, frozen


def compute_copy(params: Params, dtype: str, key: Array | None = None) -> Params:
  """The parameters in the dtype of the computation, for programs that only read them.

  Without a key it changes no result: the layers cast every parameter to this dtype before they use
  it. Casting once avoids reading, casting and gathering float32 parameters at every denoising step.
  Arrays that already have the dtype are not copied.

  Args:
    params: the parameters.
    dtype: `model.dtype`.
    key: if given, float32 parameters are rounded to bfloat16 by chance (ops/rounding.py). The same
      key gives the same copy of the same parameters on every mesh.
  """
  if key is not None and dtype == "bfloat16":
    return _rounded_by_chance(params, key)
  return jax.tree.map(lambda x: x if x.dtype == jnp.dtype(dtype) else x.astype(dtype), params)


@jax.jit  # so that random numbers are not stored, and each device draws those of its own part
def _rounded_by_chance(params: Params, key: Array) -> Params:
  def rounded(path, x):
    name = zlib.crc32(jax.tree_util.keystr(path).encode()) >> 1
    return stochastic_round(x, jax.random.fold_in(key, name)) if x.dtype == jnp.float32 else x

  return jax.tree_util.tree_map_with_path(rounded, params)


def rounding_key(config: Config, step: int) -> Array | None:
  """The key of `compute_copy` for an RL step, the same for sampling, scores and all updates.

  None unless `rl.rounding` is "stochastic".
  """
  stochastic = config.rl.rounding == "stochastic"
  return purpose_key(config.seed, step, "round") if stochastic else None


def purpose_key(seed: int, step: int | Array, purpose: str) -> Array:
  """The PRNG key of one use of randomness, made from (seed, step, purpose) and nothing else.

  No key is carried from step to step, so a resumed run repeats the same numbers.

  Args:
    seed: `config.seed`.
    step: number of the step, from 0 on.
    purpose: one of `PURPOSES`.
  """
  key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
  return jax.random.fold_in(key, step)


PURPOSES = ("sft_mask", "sample", "resample", "estimate", "evaluate", "round")
