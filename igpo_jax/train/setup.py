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
  """Records of a source; what could not be used is reported, never dropped in silence.

  Raises:
    UserError: they cannot be read, or another process read other ones.
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
  """The run's tokenizer: the one in the workdir if there is one, else as configured.

  "sentencepiece:N" trains N pieces on the sft (else rl) source; anything else is for
  `open_tokenizer`. The result is saved in the workdir, so a run keeps its tokenizer.
  Process 0 makes it, all read it there.
  """
  kept = workdir / "tokenizer"
  from_first(lambda: None if has_tokenizer(kept) else _new_tokenizer(config).save(kept))
  return load_tokenizer(kept)


def peek_tokenizer(config: Config, workdir: epath.Path) -> Tokenizer:
  """The tokenizer that `make_tokenizer` would give; nothing is written."""
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
  """What a run with `model.lora` = `asked` begins with.

  A base stays a base, which gets fresh adapters if any are asked for. Adapters that the
  source brings are merged into their kernels where none are asked for; else the run goes on
  with them, so they have to be the ones that are asked for. Their dropout may differ: it
  belongs to the training.

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
  """Says which options of the config are not the weights', and so have no effect."""
  unset = ModelConfig()
  other = [
    f"model.{name}={getattr(asked, name)!r} (they have {getattr(source.config, name)!r})"
    for name in WEIGHTS_FIX
    if getattr(asked, name) not in (getattr(unset, name), getattr(source.config, name))
  ]
  if other and jax.process_index() == 0:
    say(f"config: the weights of init_from={source.directory} decide, not {', '.join(other)}")


def learning_rate(cfg: OptimizerConfig, total_updates: int) -> optax.Schedule:
  """Linear warm-up from 0, then constant, cosine or linear decay to 0."""
  decay = max(total_updates - cfg.warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(cfg.learning_rate),
    "cosine": optax.cosine_decay_schedule(cfg.learning_rate, decay),
    "linear": optax.linear_schedule(cfg.learning_rate, 0.0, decay),
  }[cfg.schedule]
  if cfg.warmup_steps == 0:
    return after
  # Starts at the first step's share rather than at 0: no update is without effect.
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
  """Where every array of a TrainState lives: optimizer moments beside their parameters."""
  opt_state = jax.eval_shape(optimizer.init, params)
  whole = replicated(mesh)
  opt_shardings = optax.tree_map_params(
    optimizer, lambda _, s: s, opt_state, shardings, transform_non_params=lambda _: whole
  )
  return TrainState(whole, shardings, opt_shardings, whole, whole)


def new_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
  """A TrainState that has seen no update."""
  zero = lambda: jnp.zeros((), jnp.int32)
  return TrainState(zero(), params, optimizer.init(params), zero(), zero())


def make_state(
  optimizer: optax.GradientTransformation,
  params: Params,
  shardings: Any,
  mesh: jax.sharding.Mesh,
  donate: bool = False,
) -> TrainState:
  """A fresh TrainState around a copy of `params`, so that updates leave them alone.

  With `donate` around `params` themselves, which are of no use to the caller any more.
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
  """(a fresh state of what is trained, the rest): adapters and base under LoRA, else all and {}.

  With `donate` the trained part of `model.params` is used up.
  """
  trainable, frozen = lora.split(model.params)
  state = make_state(optimizer, trainable, lora.split(model.shardings)[0], mesh, donate)
  return state, frozen


def compute_copy(params: Params, dtype: str, key: Array | None = None) -> Params:
  """The parameters in the compute dtype, for programs that only read them; no copy where
  nothing is to be cast.

  Exact without a key: the layers cast every parameter to the compute dtype before they use it.
  Done once, so a float32 master is not read, cast and gathered again at every denoising step.

  Args:
    key: rounds float32 parameters to bfloat16 by chance instead (ops/rounding.py). The same key
      gives the same copy of the same parameters, whatever the mesh.
  """
  if key is not None and dtype == "bfloat16":
    return _rounded_by_chance(params, key)
  return jax.tree.map(lambda x: x if x.dtype == jnp.dtype(dtype) else x.astype(dtype), params)


@jax.jit  # so that no random number is held, and each device draws those of its own part
def _rounded_by_chance(params: Params, key: Array) -> Params:
  def rounded(path, x):
    name = zlib.crc32(jax.tree_util.keystr(path).encode()) >> 1
    return stochastic_round(x, jax.random.fold_in(key, name)) if x.dtype == jnp.float32 else x

  return jax.tree_util.tree_map_with_path(rounded, params)


def rounding_key(config: Config, step: int) -> Array | None:
  """`compute_copy`'s key for an RL step: one for sampling, scores and all its updates."""
  stochastic = config.rl.rounding == "stochastic"
  return purpose_key(config.seed, step, "round") if stochastic else None


def purpose_key(seed: int, step: int | Array, purpose: str) -> Array:
  """The PRNG key of one use of randomness: (seed, step, purpose), nothing else.

  No key is ever carried from step to step, so a resumed run repeats the same numbers.
  """
  key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
  return jax.random.fold_in(key, step)


PURPOSES = ("sft_mask", "sample", "resample", "estimate", "evaluate", "round")
