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
from igpo_jax.models.lora import ADAPTER_LEAVES

PEFT_PREFIX = "base_model.model."  # how PEFT names the module it wraps


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
    defaults: values of our fields where config.json has none.
    required: option -> the only values under which the mathematics is ours.
    stated: those of `required` that must be present, because the published code's
      default for them is something else.
    inert: options that do not change what the network computes at evaluation.
    top, block: our parameter -> their key; `{}` is the layer.
  """

  model_type: str
  fields: Mapping[str, str]
  defaults: Mapping[str, Any]
  required: Mapping[str, tuple[Any, ...]]
  stated: frozenset[str]
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
  defaults={},
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
  stated=frozenset({"activation_type", "block_type", "include_bias", "layer_norm_type", "rope"}),
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

ILLADA = Family(
  model_type="illada",
  fields={
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden": "intermediate_size",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "mask_id": "mask_token_id",
    "eos_id": "eos_token_id",
  },
  # The published config.json names no mask token; its generate.py uses 5, "<[MASK]>".
  # The Hugging Face writer leaves tie_word_embeddings out where it is true.
  defaults={"mask_id": 5, "tie_embeddings": True},
  required={
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "layer_norm_eps": (None,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
  },
  stated=frozenset(),
  inert=frozenset({
    "attention_dropout", "head_dim", "initializer_range", "max_position_embeddings",
    "pad_token_id", "pretraining_tp", "resid_pdrop", "use_cache",
  }),
  top={
    "wte/embedding": "model.embed_tokens.weight",
    "ln_f/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
  },
  block={
    "attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "q_proj/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "k_proj/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "v_proj/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "attn_out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "ff_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "ff_proj/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "up_proj/kernel": "model.layers.{}.mlp.up_proj.weight",
    "ff_out/kernel": "model.layers.{}.mlp.down_proj.weight",
  },
)  # fmt: skip

FAMILIES = {family.model_type: family for family in (LLADA, ILLADA)}

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
    if option not in hf_config and option in family.stated:
      problems.append(f"{option} is missing (only {allowed[0]!r} is supported)")
    elif hf_config.get(option, allowed[0]) not in allowed:
      problems.append(f"{option}={hf_config[option]!r} is not supported (only {allowed[0]!r})")
  known = {*family.fields.values(), *family.required, *family.inert, *_METADATA}
  problems += [f"unknown option {key}={hf_config[key]!r}" for key in hf_config if key not in known]

  values = {ours: hf_config.get(theirs) for ours, theirs in family.fields.items()}
  if values["vocab_size"] is None:  # the embedding has vocab_size rows then
    values["vocab_size"] = hf_config.get("vocab_size")
  values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
  for ours, default in family.defaults.items():
    values[ours] = default if values[ours] is None else values[ours]
  if values["mlp_hidden"] is None and None not in (hf_config.get("mlp_ratio"), values["d_model"]):
    values["mlp_hidden"] = int(hf_config["mlp_ratio"] * values["d_model"])
  eos = values.pop("eos_id")
  stop_ids = tuple(eos) if isinstance(eos, list) else (eos,)
  for ours, value in {**values, "eos_id": stop_ids[0] if stop_ids else None}.items():
    if value is None:
      problems.append(f"{family.fields[ours]} is missing")
  head_dim = hf_config.get("head_dim")
  if head_dim is not None and head_dim * (values["n_heads"] or 0) != values["d_model"]:
    problems.append(f"head_dim={head_dim} is not {family.fields['d_model']} / heads")
  if problems:
    raise UserError(f"{where}: {'; '.join(problems)}")
  return ModelConfig(**values, eos_id=stop_ids[0], stop_ids=stop_ids)


def hf_config(config: ModelConfig) -> dict[str, Any]:
  """A LLaDA config.json for a model that was trained from scratch here.

  It has the keys of the released one, so that the released code reads it.
  """
  stop_ids = config.stop_ids or (config.eos_id,)
  sizes = {theirs: getattr(config, ours) for ours, theirs in LLADA.fields.items()}
  out = {
    **{option: allowed[0] for option, allowed in LLADA.required.items() if option != "clip_qkv"},
    **sizes,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
      "AutoConfig": "configuration_llada.LLaDAConfig",
      "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
      "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "embedding_dropout": 0.0,
    "eos_token_id": stop_ids[0],
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "max_sequence_length": 4096,
    "mlp_ratio": 4,
    "model_type": LLADA.model_type,
    "n_kv_heads": config.kv_heads,
    "pad_token_id": config.eos_id,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "use_cache": False,
    "vocab_size": config.vocab_size,
  }
  return dict(sorted(out.items()))


@functools.lru_cache(maxsize=8)
def entries(family_name: str, config: ModelConfig) -> tuple[Entry, ...]:
  """Every parameter with its keys, in the order of the tree.

  With `config.lora.rank` the adapters are among them, under the names that PEFT
  gives them; without, this is the base model.
  """
  family = FAMILIES[family_name]
  shapes = jax.eval_shape(lambda: make_lm(config).init(jax.random.key(0)))
  out = []
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    path = tuple(k.key for k in key_path)
    stacked = path[0] == "blocks"
    adapter = path[-1] in ADAPTER_LEAVES
    name = "/".join((*path[:-1], "kernel") if adapter else path)
    pattern = family.block[name.removeprefix("blocks/")] if stacked else family.top[name]
    if adapter:
      part = {"lora_a": "lora_A", "lora_b": "lora_B"}[path[-1]]
      pattern = f"{PEFT_PREFIX}{pattern.removesuffix('weight')}{part}.weight"
    keys = tuple(pattern.format(n) for n in range(config.n_layers)) if stacked else (pattern,)
    out.append(Entry(path, tuple(leaf.shape), keys, stacked, adapter or path[-1] == "kernel"))
  return tuple(out)


def split_entries(all_entries: tuple[Entry, ...]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
  """(base, adapters)."""
  is_adapter = lambda entry: entry.path[-1] in ADAPTER_LEAVES
  return (
    tuple(e for e in all_entries if not is_adapter(e)),
    tuple(e for e in all_entries if is_adapter(e)),
  )


def tied_keys(family_name: str, config: ModelConfig) -> tuple[str, ...]:
  """Keys that a file may hold although the embedding stands for them."""
  return (FAMILIES[family_name].top["head/kernel"],) if config.tie_embeddings else ()
