"""The legend of dimensions, and the structures of arrays that all parts of the program share.

    B   rows = P * G                    T   positions = Tp + L
    P   prompts of a batch              Tp  prompt length (left-padded to a bucket)
    G   completions per prompt (group)  L   completion length (the canvas)
    V   vocabulary                      D   model width
    N   layers                          H, K, E   query heads, key-value heads, head size
    M   micro-batches                   U   inner updates per rollout (mu)
    R   corrupted views of a row that one likelihood estimate reads

Rows are prompt-major: the G completions of a prompt are contiguous and never split across
micro-batches or devices. So [B,...] and [P,G,...] are one reshape apart. Docstrings write shapes as
`i32[B,T]`; annotations of public functions as `Int32[Array, "B T"]` (jaxtyping), which the tests
check at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

Array = jax.Array
AnyArray = jax.Array | np.ndarray  # on the devices or on the host
Params = Any  # a nested dict of arrays: what `lm.init` returns and an optimizer updates


class Routing(NamedTuple):
  """Which experts worked on which position, in every layer that has experts.

  Attributes:
    probabilities: f32[N,B,T,X], the score of each of the X experts.
    experts: i32[N,B,T,k], indices of the k experts that were chosen, the best first.
  """

  probabilities: Array
  experts: Array


class LM(NamedTuple):
  """A masked diffusion language model as pure functions over its parameters.

  `hidden` stops before the head, `head` is applied to the positions whose logits are needed, and
  `logits` does both. So the caller decides for how many positions the vocabulary's cost is paid.
  A NamedTuple of functions and ints is hashable, so an LM can be a static argument of `jax.jit`.

  Which state predicts which token: what `hidden` returns for position k predicts the token of
  position k, and so do the logits, whatever the model is. Where the network itself predicts one
  position ahead (`shift` is 1: Dream), `hidden` returns the network's state of position k - 1 for
  position k, and for position 0 the state of position 0. So a caller shifts nothing. Only a call on
  a window of the canvas has to begin `left_context` positions before what it reads.

  Attributes:
    init: `init(key) -> params`.
    hidden: `hidden(params, tokens i32[B,t], valid bool[B,T] = None, *, start=0,
      cache=None, read=None) -> (h [B,t,D], cache)`: normalized hidden states, ready for the head.
      Without `cache`, `tokens` are the whole canvas, t == T. With `cache`, `tokens` are positions
      start..start+t of a canvas: the keys and values of the other positions come from the cache,
      and those of `tokens` are written into it.
      `read=(first, width)`: return hidden states of positions first..first+width of `tokens` only,
      [B,width,D], and skip the rest of the last layer's work; `width` is static. `start` and
      `first` may be i32[B], with each row's own place. Meant for sampling; for gradients pass
      neither `cache` nor `read`.
      `dropout_key=KEY` turns on the dropout of adapters that have one.
    head: `head(params, h [...,D]) -> f32[...,V]`.
    logits: `logits(params, tokens i32[B,T], valid bool[B,T] = None) -> f32[B,T,V]`.
    unstack: `unstack(params, length) -> params`. Optional speed-up before a loop over `hidden`: on
      CPU, splits the stacked layers and precomputes the RoPE tables for `length` positions. The
      result is accepted by `hidden`, `head` and `init_cache`, and by nothing else.
    init_cache: `init_cache(params, batch, length) -> cache`, filled with zeros.
    logical_axes: `logical_axes() -> tree`: for every parameter the logical names of its dimensions
      (parallel/sharding.py).
    mask_id: id of the mask, the absorbing token.
    eos_id: id of the end of text; it also pads finished completions.
    stop_ids: tokens that end a completion, `eos_id` first.
    vocab_size: V, the width of the logits.
    shift: 1 if the network predicts the token after each position, 0 if that of its own.
    left_context: a call on a window has to begin this many positions before the first one that it
      reads, or at the beginning of the canvas. It is `shift`, or with a block-causal model
      `block_length - 1`: the earlier positions of a block change together with the later ones.
    block_length: 0: every position attends to all valid positions. Above 0 the model is
      block-causal: a position attends to its own block of this many positions and to all earlier
      blocks. Blocks are counted from the row's first valid position. Hints in later blocks are then
      not seen.
    hidden_of_two: for block-causal models, else None. `hidden_of_two(params, noisy i32[B,T],
      clean i32[B,T], valid bool[B,T] = None) -> h [B,T,D]`: hidden states of the noisy positions,
      where each attends to its own noisy block and to the clean blocks before it. So one call gives
      every block the context that it has in decoding. Takes `dropout_key=` as `hidden` does.
    routed: for models with experts, else None. `routed(params, tokens, valid = None) ->
      (h, Routing)`: as `hidden`, and which experts worked on which token. Takes `dropout_key=` as
      well. A block-causal model also takes `clean=`: h is then that of `hidden_of_two`, and the
      routing is of both copies, noisy then clean, [N,B,2T,...].
    router_loss: weight of the load-balancing loss (ops/load_balance.py), in both stages.
  """

  init: Callable[..., Params]
  hidden: Callable[..., tuple[Array, Any]]
  head: Callable[[Params, Array], Array]
  logits: Callable[..., Array]
  unstack: Callable[[Params, int], Params]
  init_cache: Callable[[Params, int, int], Any]
  logical_axes: Callable[[], Any]
  mask_id: int
  eos_id: int
  stop_ids: tuple[int, ...]
  vocab_size: int
  shift: int = 0
  left_context: int = 0
  block_length: int = 0
  hidden_of_two: Callable[..., Array] | None = None
  routed: Callable[..., tuple[Array, Routing]] | None = None
  router_loss: float = 0.0


@flax.struct.dataclass
class Canvas:
  """What denoising starts from (docs/method.md#sampling).

  Attributes:
    tokens: i32[B,T], the left-padded prompt followed by the completion. The completion holds mask
      tokens, and hints where `fixed` is True.
    fixed: bool[B,T], True on prompt, padding and hints: these tokens are never changed.
    valid: bool[B,T], False on the padding to the left of a prompt.
  """

  tokens: Int32[AnyArray, "B T"]
  fixed: Bool[AnyArray, "B T"]
  valid: Bool[AnyArray, "B T"]


@flax.struct.dataclass
class Denoised:
  """What denoising returns.

  Attributes:
    tokens: i32[B,T], the canvas with its masks filled.
    commit_step: i32[B,T], the step `block * steps_per_block + i` at which a position was committed.
      It is -1 where the token was given, and where `allow_mask` left a mask. With
      `edit_threshold`, a block has `edit_passes` numbers more.
    forwards: i32[], number of network calls of the whole batch.
    refreshes: i32[], how many of these calls computed the whole canvas. Without a cache all do.
    calls: i32[B], how many of these calls worked at the row. It does not depend on other rows.
    worked: i32[], rows that calls worked at while other rows were waiting for a slot: the sum over
      these calls.
    room: i32[], rows that these calls were made for. `worked / room` is how full they were.
    positions: f32[], how many positions all calls computed, those of all rows together (with
      guidance each twice): what denoising cost, whatever the machine.
    finite: bool[B], False for a row with a logit that was NaN or infinite: its tokens are not an
      answer of the model.
    commit_logp: f32[B,T], log-probability of each token when it was committed, under the softmax at
      temperature 1. It is 0 where nothing was chosen: where `commit_step` is -1, and where early
      stopping filled in end-of-text.
  """

  tokens: Int32[Array, "B T"]
  commit_step: Int32[Array, "B T"]
  forwards: Int32[Array, ""]
  refreshes: Int32[Array, ""]
  worked: Int32[Array, ""]
  room: Int32[Array, ""]
  positions: Float32[Array, ""]
  finite: Bool[Array, " B"]
  commit_logp: Float32[Array, "B T"]
  calls: Int32[Array, " B"]


@flax.struct.dataclass
class Rollout:
  """The prompts and completions of one step, after exploration (docs/method.md#exploration).

  Attributes:
    prompt: i32[P,Tp], left-padded.
    prompt_valid: bool[P,Tp], False on the padding.
    completion: i32[P,G,L].
    hinted: bool[P,G,L], True where a token was a fixed hint.
    commit_step: i32[P,G,L], the denoising step at which each token was committed; -1 on hints.
    advantages: f32[P,G].
    commit_logp: f32[P,G,L], log-probability of each token when it was committed; 0 on hints. None
      where nobody sampled them, as in tests; only some trace estimators need it.
  """

  prompt: Int32[Array, "P Tp"]
  prompt_valid: Bool[Array, "P Tp"]
  completion: Int32[Array, "P G L"]
  hinted: Bool[Array, "P G L"]
  commit_step: Int32[Array, "P G L"]
  advantages: Float32[Array, "P G"]
  commit_logp: Float32[Array, "P G L"] | None = None


@flax.struct.dataclass
class TrainState:
  """What an update changes, and what a checkpoint holds.

  Attributes:
    step: i32[], number of updates so far, skipped ones included.
    params: the parameters that are trained.
    opt_state: state of the optax optimizer, with arrays of the shapes of `params`.
    skipped: i32[], number of updates so far that were skipped for a loss or gradient that is not
      finite.
    skipped_in_a_row: i32[], how many updates were skipped since the last one that was applied.
  """

  step: Int32[Array, ""]
  params: Params
  opt_state: Any
  skipped: Int32[Array, ""]
  skipped_in_a_row: Int32[Array, ""]
