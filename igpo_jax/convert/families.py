"""Model families by config.json: what it says in our terms, and the names of its tensors.

A family is recognised by `model_type`, never by the name of a directory. An option
that would change the mathematics is either understood or refused by name; an
option that this list does not know is refused too, unless it is known to be inert.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from igpo_jax.cli import UserError
from igpo_jax.config import ModelConfig
from igpo_jax.models.llada import make_lm


@dataclasses.dataclass(frozen=True)
class Entry:
  """One of our parameters and the Hugging Face tensors it is made of.

  Attributes:
    path: where it sits in the parameter tree, for example ("blocks", "q_proj", "kernel").
    shape: its shape, layers first where stacked.
    keys: one key, or one per layer.
    stacked: True if `keys` are layers along the first axis.
    transposed: True for kernels: theirs are [out, in], ours [in, out].
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  keys: tuple[str, ...]
  stacked: bool
  transposed: bool

  @property
  def name(self) -> str:
    return "/".join(self.path)

  @property
  def slice_shape(self) -> tuple[int, ...]:
    """Our shape of what one key holds."""
    return self.shape[1:] if self.stacked else self.shape

  @property
  def hf_shape(self) -> tuple[int, ...]:
    """Their shape of what one key holds."""
    return self.slice_shape[::-1] if self.transposed else self.slice_shape

  @property
  def size(self) -> int:
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Family:
  """A published architecture that our transformer computes exactly.

  Attributes:
    model_type: the value of config.json's key of that name.
    fields: our ModelConfig field -> their key.
    required: option -> the only values under which the mathematics is ours. A
      missing option counts as the first of them.
    inert: options that do not change what the network computes at evaluation.
    top, block: our parameter -> their key; `{}` is the layer.
  """

  model_type: str
  fields: Mapping[str, str]
  required: Mapping[str, tuple[Any, ...]]
  inert: frozenset[str]
  top: Mapping[str, str]
  block: Mapping[str, str]


_BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")

LLADA = Family(
  model_type="llada",
  fields={
    "d_model": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "mlp_hidden": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "weight_tying",
    "mask_id": "mask_token_id",
    "eos_id": "eos_token_id",
  },
  required={
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (None,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (None, False),
    "rope": (True,),
    # False rotates in bf16: a difference of rounding that we do not reproduce.
    "rope_full_precision": (True,),
    "scale_logits": (False,),
  },
  inert=frozenset({
    "alibi_bias_max", "attention_dropout", "attention_layer_norm_with_affine",
    "embedding_dropout", "flash_attention", "init_cutoff_factor", "init_device", "init_fn",
    "init_std", "max_sequence_length", "mlp_ratio", "pad_token_id", "precision",
    "residual_dropout", "use_cache", "vocab_size",
  }),
  top={
    "wte/embedding": "model.transformer.wte.weight",
    "ln_f/scale": "model.transformer.ln_f.weight",
    "head/kernel": "model.transformer.ff_out.weight",
  },
  block={
    **{f"{name}/kernel": f"model.transformer.blocks.{{}}.{name}.weight"
       for name in _BLOCK_LINEARS},
    **{f"{name}/scale": f"model.transformer.blocks.{{}}.{name}.weight"
       for name in ("attn_norm", "ff_norm")},
  },
)  # fmt: skip

FAMILIES = {family.model_type: family for family in (LLADA,)}

# Keys that any config.json may carry and that no network reads.
_METADATA = frozenset({
  "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version",
  "_name_or_path", "tie_word_embeddings", "bos_token_id", "eot_token_id", "output_attentions",
  "output_hidden_states", "return_dict",
})  # fmt: skip


def find_family(hf_config: Mapping[str, Any], where: Any) -> Family:
  """The family of a config.json.

  Raises:
    UserError: its model_type is none that is known here.
  """
  kind = hf_config.get("model_type")
  if kind not in FAMILIES:
    raise UserError(
      f"{where}: model_type {kind!r} is not one of {', '.join(sorted(FAMILIES))}; "
      "this model computes something else"
    )
  return FAMILIES[kind]


def model_config(hf_config: Mapping[str, Any], where: Any) -> ModelConfig:
  """What a config.json says, as a ModelConfig (float32; the caller chooses dtypes).

  Args:
    hf_config: the parsed config.json.
    where: the file, for messages.

  Raises:
    UserError: an unknown model_type, a missing value, or options that change the
      mathematics; all of them in one message.
  """
  family = find_family(hf_config, where)
  problems = []
  for option, allowed in family.required.items():
    value = hf_config.get(option, allowed[0])
    if value not in allowed:
      problems.append(f"{option}={value!r} is not supported (only {allowed[0]!r})")
  known = {*family.fields.values(), *family.required, *family.inert, *_METADATA}
  problems += [f"unknown option {key}={hf_config[key]!r}" for key in hf_config if key not in known]

  values = {ours: hf_config.get(theirs) for ours, theirs in family.fields.items()}
  if values["vocab_size"] is None:  # the embedding has vocab_size rows then
    values["vocab_size"] = hf_config.get("vocab_size")
  values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
  values["tie_embeddings"] = bool(values["tie_embeddings"])
  if values["mlp_hidden"] is None and None not in (hf_config.get("mlp_ratio"), values["d_model"]):
    values["mlp_hidden"] = int(hf_config["mlp_ratio"] * values["d_model"])
  eos = values.pop("eos_id")
  stop_ids = tuple(eos) if isinstance(eos, list) else (eos,)
  for ours, value in {**values, "eos_id": stop_ids[0] if stop_ids else None}.items():
    if value is None:
      problems.append(f"{family.fields[ours]} is missing")
  if problems:
    raise UserError(f"{where}: {'; '.join(problems)}")
  return ModelConfig(**values, eos_id=stop_ids[0], stop_ids=stop_ids)


@functools.lru_cache(maxsize=8)
def entries(family_name: str, config: ModelConfig) -> tuple[Entry, ...]:
  """Every parameter of the model with its keys, in the order of the tree."""
  family = FAMILIES[family_name]
  shapes = jax.eval_shape(make_lm(config).init, jax.random.key(0))
  out = []
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    path = tuple(k.key for k in key_path)
    stacked = path[0] == "blocks"
    if stacked:
      pattern = family.block["/".join(path[1:])]
      keys = tuple(pattern.format(n) for n in range(config.n_layers))
    else:
      keys = (family.top["/".join(path)],)
    out.append(Entry(path, tuple(leaf.shape), keys, stacked, path[-1] == "kernel"))
  return tuple(out)
