"""The legend of dimensions, and the arrays that travel between rooms.

    B   rows = P * G                    T   positions = Tp + L
    P   prompts of a batch              Tp  prompt length (left-padded to a bucket)
    G   completions per prompt (group)  L   completion length (the canvas)
    V   vocabulary                      D   model width
    N   layers                          H, K, E   query heads, key-value heads, head size
    M   micro-batches                   U   inner updates per rollout (mu)
    R   corrupted views of a row that one likelihood estimate reads

Rows are prompt-major: the G completions of a prompt are contiguous and never
split across micro-batches or devices, so [B, ...] and [P, G, ...] are one
reshape apart. Shapes are written `i32[B,T]` at every boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

Array = jax.Array
Params = Any  # a nested dict of arrays: what `lm.init` returns and an optimizer updates


class LM(NamedTuple):
  """A masked diffusion language model as pure functions over its parameters.

  The callers choose where to pay for the vocabulary: `hidden` stops before the
  head, `head` is applied to the positions that are needed, `logits` does both.
  A NamedTuple of functions and ints is hashable, so it is a static argument of
  `jax.jit`.

  Attributes:
    init: `init(key) -> params`.
    hidden: `hidden(params, tokens i32[B,t], valid bool[B,T] = None, *, start=0,
      cache=None, read=None) -> (h [B,t,D], cache)`, normalised, ready for the head.
      Without a cache t == T. With one, `tokens` sit at positions start..start+t of a
      canvas whose other keys and values come from the cache, and theirs are put there.
      `read=(first, width)` returns those of the t positions only, [B,width,D], and
      saves the rest of the last layer; `width` is static. For sampling: gradients
      are better taken without either. `dropout_key=` turns the adapters' dropout on,
      if there is any.
    head: `head(params, h [...,D]) -> f32[...,V]`.
    logits: `logits(params, tokens i32[B,T], valid bool[B,T] = None) -> f32[B,T,V]`.
    unstack: `unstack(params, length) -> params` in the form that a loop around `hidden`
      reads fastest on this platform, on a canvas of so many positions; for `hidden`,
      `head` and `init_cache` only.
    init_cache: `init_cache(params, batch, length) -> cache`, zeros.
    logical_axes: `logical_axes() ->` the parameter tree's logical axis names.
    mask_id: the absorbing token.
    eos_id: end of text; it also pads finished completions.
    stop_ids: tokens that end a completion, `eos_id` first.
    vocab_size: V, the width of the logits.
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


@flax.struct.dataclass
class Canvas:
  """What denoising starts from (docs/method.md#sampling).

  Attributes:
    tokens: i32[B,T], left-padded prompt followed by the completion: mask tokens
      and, where `fixed`, hints.
    fixed: bool[B,T], True on prompt, padding and hints: never changed.
    valid: bool[B,T], False on the padding to the left of a prompt.
  """

  tokens: Array
  fixed: Array
  valid: Array


@flax.struct.dataclass
class Denoised:
  """What denoising returns.

  Attributes:
    tokens: i32[B,T], the canvas with its masks filled.
    commit_step: i32[B,T], the step `block * steps_per_block + i` at which a
      position was committed; -1 where it was fixed (or, with `allow_mask`, where
      a mask was left).
    forwards: i32[], calls of the network that the loop made.
    refreshes: i32[], how many of them saw the whole canvas: all, without a cache.
    finite: bool[B], False where a row's logits were no numbers (NaN or infinite): its tokens
      are then no answer of the model.
  """

  tokens: Array
  commit_step: Array
  forwards: Array
  refreshes: Array
  finite: Array


@flax.struct.dataclass
class Rollout:
  """One step's experience on the device, after exploration (docs/method.md#exploration).

  Attributes:
    prompt: i32[P,Tp], left-padded.
    prompt_valid: bool[P,Tp].
    completion: i32[P,G,L].
    hinted: bool[P,G,L], True where a token was a fixed hint.
    commit_step: i32[P,G,L], -1 on hints.
    advantages: f32[P,G].
  """

  prompt: Array
  prompt_valid: Array
  completion: Array
  hinted: Array
  commit_step: Array
  advantages: Array


@flax.struct.dataclass
class TrainState:
  """What an update changes, and what a checkpoint holds.

  Attributes:
    step: i32[], updates applied or skipped.
    params: the parameters.
    opt_state: optax's state, mirroring `params`.
    skipped: i32[], updates skipped so far for a non-finite loss or gradient.
    skipped_in_a_row: i32[], how many of the latest updates were skipped.
  """

  step: Array
  params: Params
  opt_state: Any
  skipped: Array
  skipped_in_a_row: Array
