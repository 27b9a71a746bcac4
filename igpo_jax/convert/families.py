"""Model families by config.json: what it says in our terms, and the names of its tensors.

A family is recognised by `model_type`, never by the name of a directory. An option
that would change the mathematics is either understood or refused by name; an
option that this list does not know is refused too, unless it is known to be inert.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from igpo_jax.config import ModelConfig
from igpo_jax.convert.safetensors_io import raise_problems
from igpo_jax.errors import UserError
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

# The released code, which Hugging Face's Auto classes load where config.json names it.
CODE_FILES = ("configuration_llada.py", "modeling_llada.py")
AUTO_MAP = {
  "AutoConfig": "configuration_llada.LLaDAConfig",
  "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
  "AutoModel": "modeling_llada.LLaDAModelLM",
}

FAMILIES = {family.model_type: family for family in (LLADA, ILLADA)}

# Keys that any config.json may carry and that no network reads.
_METADATA = frozenset({
  "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version",
  "tie_word_embeddings",  # read where a family says so
  # The Hugging Face base class: special tokens, labels, what its calls return.
  "bos_token_id", "eot_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
  "decoder_start_token_id", "id2label", "label2id", "problem_type", "finetuning_task",
  "task_specific_params", "tokenizer_class", "prefix", "output_attentions",
  "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss",
  "chunk_size_feed_forward", "is_decoder",
  # Options of generation, which versions of the library kept here.
  "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
  "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
  "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
  "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
  "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
  "suppress_tokens", "begin_suppress_tokens",
  # How a training program ran the network: memory and kernels, not what it computes.
  "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
  "attn_implementation", "use_flash_attention", "use_flash_attention_2", "use_flash_attn",
  "flash_attn", "flash_attn_varlen", "use_sdpa", "use_liger_kernel", "use_fused_kernels",
  "fused_cross_entropy", "unsloth_version", "unsloth_fixed", "unsloth_training",
  "tokenizer_padding_side", "tokenizer_model_max_length", "model_max_length",
  "trainable_parameters",
})  # fmt: skip

# Keys that any config.json may carry, and the values under which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "add_cross_attention": (False, None),
  "cross_attention_hidden_size": (None,),
  "is_encoder_decoder": (False, None),
  "pruned_heads": (None, {}),
  "quantization_config": (None, {}),
  "tie_encoder_decoder": (False, None),
}

# What a value has to be: in words, and as a test. JSON's true is no number here.
_Kind = tuple[str, Callable[[Any], bool]]
_SIZE: _Kind = ("a whole number from 1", lambda v: type(v) is int and 1 <= v <= 10**8)
_LAYERS: _Kind = ("a whole number from 1 to 9999", lambda v: type(v) is int and 1 <= v <= 9999)
_NUMBER: _Kind = ("a number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e30)
_SWITCH: _Kind = ("true or false", lambda v: type(v) is bool)
_ID: _Kind = ("a token id, a whole number from 0", lambda v: type(v) is int and v >= 0)
_IDS: _Kind = (
  "a token id, a whole number from 0, or a list of them",
  lambda v: _ID[1](v) or (type(v) is list and bool(v) and all(map(_ID[1], v))),
)
_KINDS: Mapping[str, _Kind] = {
  "d_model": _SIZE,
  "n_layers": _LAYERS,
  "n_heads": _SIZE,
  "n_kv_heads": _SIZE,
  "mlp_hidden": _SIZE,
  "vocab_size": _SIZE,
  "rope_theta": _NUMBER,
  "rms_norm_eps": _NUMBER,
  "tie_embeddings": _SWITCH,
  "mask_id": _ID,
  "eos_id": _IDS,
}


def find_family(hf_config: Mapping[str, Any], where: Any) -> Family:
  """The family of a config.json.

  Raises:
    UserError: its model_type is none that is known here.
  """
  kind = hf_config.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
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
  hf_config, problems = _plain_rotation(hf_config)
  for option, allowed in {**_NEUTRAL, **family.required}.items():
    if option not in hf_config and option in family.stated:
      problems.append(f"{option} is missing (only {allowed[0]!r} is supported)")
    elif hf_config.get(option, allowed[0]) not in allowed:
      problems.append(f"{option}={hf_config[option]!r} is not supported (only {allowed[0]!r})")
  known = {*family.fields.values(), *family.required, *family.inert, *_METADATA, *_NEUTRAL}
  problems += [
    f"unknown option {key}={hf_config[key]!r}"
    for key in hf_config
    if key not in known and not key.startswith("_")  # private to the library that wrote it
  ]
  values = _values(family, hf_config, problems)
  if not problems:
    problems += _contradictions(family, hf_config, values)
  raise_problems(where, problems)
  eos = values.pop("eos_id")
  stop_ids = tuple(eos) if isinstance(eos, list) else (eos,)
  return ModelConfig(**values, eos_id=stop_ids[0], stop_ids=stop_ids)


def _plain_rotation(hf_config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """(the config with `rope_theta` in its old place, problems).

  transformers 5 writes {"rope_parameters": {"rope_type": "default", "rope_theta": ...}} where
  older versions wrote rope_theta, and `rope_scaling` for any rotation but the default one.
  """
  out, problems = dict(hf_config), []
  for key in ("rope_parameters", "rope_scaling"):
    rope = out.get(key)
    if not isinstance(rope, dict | None):
      continue  # an unknown option, or one that the family does not support
    out.pop(key, None)
    if rope is None:
      continue
    others = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta")}
    others = {k: v for k, v in others.items() if (k, v) != ("partial_rotary_factor", 1)}
    plain = rope.get("rope_type", rope.get("type", "default")) in ("default", None)
    if not plain or any(v is not None for v in others.values()):
      problems.append(f"{key}={rope!r} is not supported (only the default rotation)")
    theta = rope.get("rope_theta")
    if theta is not None and out.setdefault("rope_theta", theta) != theta:
      problems.append(f"rope_theta={out['rope_theta']!r}, but {key} has rope_theta={theta!r}")
  return out, problems


def _values(family: Family, hf_config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
  """Our fields; adds to `problems` what is missing or of a wrong kind."""
  values = {ours: hf_config.get(theirs) for ours, theirs in family.fields.items()}
  names = dict(family.fields)
  if values["vocab_size"] is None:  # the embedding has vocab_size rows then
    values["vocab_size"], names["vocab_size"] = hf_config.get("vocab_size"), "vocab_size"
  if values["n_kv_heads"] is None:
    values["n_kv_heads"], names["n_kv_heads"] = values["n_heads"], names["n_heads"]
  for ours, default in family.defaults.items():
    values[ours] = default if values[ours] is None else values[ours]
  ratio = hf_config.get("mlp_ratio")
  if values["mlp_hidden"] is None and _NUMBER[1](ratio) and _SIZE[1](values["d_model"]):
    values["mlp_hidden"], names["mlp_hidden"] = int(ratio * values["d_model"]), "mlp_ratio"
  for ours, value in values.items():
    what, fits = _KINDS[ours]
    if value is None:
      problems.append(f"{names[ours]} is missing")
    elif not fits(value):
      problems.append(f"{names[ours]}={value!r} should be {what}")
  return values


def _contradictions(
  family: Family, hf_config: Mapping[str, Any], values: Mapping[str, Any]
) -> list[str]:
  """What cannot be, of values that are each of the right kind."""
  theirs, problems = family.fields, []
  size, heads, kv_heads = (values[k] for k in ("d_model", "n_heads", "n_kv_heads"))
  if size % heads:
    problems.append(f"{theirs['d_model']}={size} is not a multiple of {theirs['n_heads']}={heads}")
  elif size // heads % 2:
    problems.append(f"{theirs['d_model']} / {theirs['n_heads']}={size // heads} should be even")
  if heads % kv_heads:
    problems.append(
      f"{theirs['n_heads']}={heads} is not a multiple of {theirs['n_kv_heads']}={kv_heads}"
    )
  head_dim = hf_config.get("head_dim")
  if head_dim is not None and (type(head_dim) is not int or head_dim * heads != size):
    problems.append(
      f"head_dim={head_dim!r} is not {theirs['d_model']} / {theirs['n_heads']}={size / heads:g}"
    )
  rows, eos = values["vocab_size"], values["eos_id"]
  stops = eos if isinstance(eos, list) else [eos]
  for name, ids in ((theirs["mask_id"], [values["mask_id"]]), (theirs["eos_id"], stops)):
    problems += [
      f"{name}={n} is past the embedding, which has {rows} rows" for n in ids if n >= rows
    ]
  if values["mask_id"] in stops:
    problems.append(f"{theirs['mask_id']} and {theirs['eos_id']} are both {values['mask_id']}")
  return problems


def hf_config(config: ModelConfig) -> dict[str, Any]:
  """A LLaDA config.json for a model that was trained from scratch here.

  It has the keys of the released one, so that the released code reads it, but for `auto_map`:
  that names the files of the code, which are not there.
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


def tied_copies(family_name: str, config: ModelConfig) -> dict[str, str]:
  """Keys that a file may hold although one of our parameters stands for them: key -> name."""
  head = FAMILIES[family_name].top["head/kernel"]
  return {head: "wte/embedding"} if config.tie_embeddings else {}
