"""Translates a config.json into a ModelConfig, by the family of the model, and back.

A family is recognized by `model_type`, never by the name of a directory. An option that would
change the mathematics is either understood or refused by name. An option that the family does not
know is refused as well, unless it is known to have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from igpo_jax.config import ModelConfig
from igpo_jax.convert.safetensors_io import raise_problems
from igpo_jax.errors import UserError
from igpo_jax.models.families import FAMILIES, check
from igpo_jax.models.families import model_config as make_config
from igpo_jax.models.family import Family

# Keys that any config.json may carry and that no network reads.
_METADATA = frozenset({
  "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version",
  "transformers.js_config",
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

# What a value has to be: in words, and as a test. JSON's true does not count as a number here.
_Kind = tuple[str, Callable[[Any], bool]]
_SIZE: _Kind = ("a whole number from 1", lambda v: type(v) is int and 1 <= v <= 10**8)
_NATURAL: _Kind = ("a whole number from 0", lambda v: type(v) is int and 0 <= v <= 10**8)
_LAYERS: _Kind = ("a whole number from 1 to 9999", lambda v: type(v) is int and 1 <= v <= 9999)
_NUMBER: _Kind = ("a number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e30)
_SHARE: _Kind = ("a number above 0, at most 1", lambda v: type(v) in (int, float) and 0 < v <= 1)
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
  "head_dim": _NATURAL,
  "mlp_hidden": _SIZE,
  "vocab_size": _SIZE,
  "rope_theta": _NUMBER,
  "rotary_share": _SHARE,
  "rms_norm_eps": _NUMBER,
  "tie_embeddings": _SWITCH,
  "shift_logits": _SWITCH,
  "attention_block": _SIZE,
  "mask_id": _ID,
  "eos_id": _IDS,
  "moe.experts": _SIZE,
  "moe.experts_per_token": _SIZE,
  "moe.expert_hidden": _SIZE,
  "moe.shared_hidden": _NATURAL,
  "moe.dense_layers": _NATURAL,
  "moe.groups": _NATURAL,
  "moe.groups_kept": _NATURAL,
  "moe.scale": _NUMBER,
}


def find_family(hf_config: Mapping[str, Any], where: Any) -> Family:
  """The family of a config.json.

  Args:
    hf_config: the parsed config.json.
    where: the file, for messages.

  Raises:
    UserError: its model_type is unknown; the message lists the known ones.
  """
  kind = hf_config.get("model_type")
  found = [
    family
    for family in FAMILIES.values()
    if kind in family.model_types and family.marks <= hf_config.keys()
  ]
  if found:
    return max(found, key=lambda family: len(family.marks))
  known = sorted({name for family in FAMILIES.values() for name in family.model_types})
  causal = next((f for f in FAMILIES.values() if kind and kind == f.autoregressive), None)
  hint = (
    "; it is an autoregressive model: python -m igpo_jax.convert --as-diffusion makes one of it "
    "that can be fine-tuned"
    if causal
    else ""
  )
  raise UserError(
    f"{where}: model_type {kind!r} is not one of {', '.join(known)}; this model computes "
    f"something else{hint}"
  )


def read_config(
  hf_config: Mapping[str, Any], where: Any, mask_id: Callable[[], int | None] = lambda: None
) -> ModelConfig:
  """Translates a config.json into a ModelConfig. It has float32; the caller chooses dtypes.

  Args:
    hf_config: the parsed config.json.
    where: the file, for messages.
    mask_id: returns the id of the mask token, or None; called if config.json has none.

  Raises:
    UserError: the model_type is unknown, values are missing, or options change the mathematics.
      One message has all problems.
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
  values = _values(family, hf_config, mask_id, problems)
  values |= family.derive(hf_config, problems)
  if not problems:
    problems += _contradictions(family, hf_config, values)
  raise_problems(where, problems, most=100)
  eos = values.pop("eos_id")
  stop_ids = tuple(eos) if isinstance(eos, list) else (eos,)
  return make_config(family.name, values, eos_id=stop_ids[0], stop_ids=stop_ids)


def _plain_rotation(hf_config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Moves `rope_theta` to the place where older versions of `transformers` wrote it.

  transformers 5 writes {"rope_parameters": {"rope_type": "default", "rope_theta": ...}} instead.
  Older versions wrote rope_theta, and `rope_scaling` for any rotation but the default one.

  Returns:
    (the new config.json, problems: rotations that are not supported).
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


def _values(
  family: Family,
  hf_config: Mapping[str, Any],
  mask_id: Callable[[], int | None],
  problems: list[str],
) -> dict[str, Any]:
  """Our fields from a config.json. Appends to `problems` what is missing or of a wrong kind."""
  values = {ours: hf_config.get(theirs) for ours, theirs in family.fields.items()}
  names = dict(family.fields)
  instead = {"n_kv_heads": family.fields["n_heads"], **family.instead}
  for ours, theirs in instead.items():
    if values[ours] is None:
      values[ours], names[ours] = hf_config.get(theirs), theirs
  if values["mask_id"] is None and "mask_id" not in family.defaults:
    values["mask_id"] = mask_id()
  for ours, default in family.defaults.items():
    values[ours] = default if values[ours] is None else values[ours]
  ratio = hf_config.get("mlp_ratio")
  if values.get("mlp_hidden", 1) is None and _NUMBER[1](ratio) and _SIZE[1](values["d_model"]):
    values["mlp_hidden"], names["mlp_hidden"] = int(ratio * values["d_model"]), "mlp_ratio"
  for ours, value in values.items():
    what, fits = _KINDS[ours]
    if value is None:
      problems.append(f"{names[ours]} is missing")
    elif not fits(value):
      problems.append(f"{names[ours]}={value!r} should be {what}")
    elif _KINDS[ours] in (_NUMBER, _SHARE):
      values[ours] = float(value)  # jax takes no whole number past int32
  return values


def _contradictions(
  family: Family, hf_config: Mapping[str, Any], values: Mapping[str, Any]
) -> list[str]:
  """Problems of values that are each of the right kind, but do not fit each other."""
  theirs, problems = family.fields, []
  size, heads, kv_heads = (values[k] for k in ("d_model", "n_heads", "n_kv_heads"))
  of_its_own = values.get("head_dim")
  if not of_its_own and size % heads:
    problems.append(f"{theirs['d_model']}={size} is not a multiple of {theirs['n_heads']}={heads}")
  elif not of_its_own and size // heads % 2:
    problems.append(f"{theirs['d_model']} / {theirs['n_heads']}={size // heads} should be even")
  if heads % kv_heads:
    problems.append(
      f"{theirs['n_heads']}={heads} is not a multiple of {theirs['n_kv_heads']}={kv_heads}"
    )
  head_dim = hf_config.get("head_dim")
  if "head_dim" not in theirs and head_dim is not None:
    if type(head_dim) is not int or head_dim * heads != size:
      problems.append(
        f"head_dim={head_dim!r} is not {theirs['d_model']} / {theirs['n_heads']}={size / heads:g}"
      )
  elif of_its_own and int(of_its_own * values.get("rotary_share", 1)) % 2:
    problems.append(f"{theirs['head_dim']}={of_its_own}: what is rotated of it should be even")
  rows, eos = values["vocab_size"], values["eos_id"]
  stops = eos if isinstance(eos, list) else [eos]
  for name, ids in ((theirs["mask_id"], [values["mask_id"]]), (theirs["eos_id"], stops)):
    problems += [
      f"{name}={n} is past the embedding, which has {rows} rows" for n in ids if n >= rows
    ]
  if values["mask_id"] in stops:
    problems.append(f"{theirs['mask_id']} and {theirs['eos_id']} are both {values['mask_id']}")
  experts = {k.removeprefix("moe."): v for k, v in values.items() if k.startswith("moe.")}
  if experts.get("experts_per_token", 0) > experts.get("experts", 0):
    problems.append(
      f"{theirs['moe.experts_per_token']}={experts['experts_per_token']} is above "
      f"{theirs['moe.experts']}={experts['experts']}"
    )
  if experts.get("groups") and experts["experts"] % experts["groups"]:
    problems.append(
      f"{theirs['moe.experts']}={experts['experts']} is not a multiple of "
      f"{theirs['moe.groups']}={experts['groups']}"
    )
  if experts.get("groups_kept", 0) > experts.get("groups", 0):
    problems.append(
      f"{theirs['moe.groups_kept']}={experts['groups_kept']} is above "
      f"{theirs['moe.groups']}={experts['groups']}"
    )
  return problems


def hf_config(config: ModelConfig) -> dict[str, Any]:
  """A config.json for a model that was trained from scratch here.

  It has the keys of the released one, so that the released code can read it. Only `auto_map` is
  left out, since it names files of that code, which are not there.
  """
  family = check(config)
  stop_ids = config.stop_ids or (config.eos_id,)
  sizes = {theirs: _field(config, ours) for ours, theirs in family.fields.items()}
  out = {
    **{option: allowed[0] for option, allowed in family.required.items() if allowed[0] is not None},
    **sizes,
    **family.written,
    family.fields["eos_id"]: stop_ids[0],
    "model_type": family.model_types[0],
    family.fields["n_kv_heads"]: config.kv_heads,
    "pad_token_id": config.eos_id,
    "vocab_size": config.vocab_size,
  }
  if "head_dim" in family.fields:
    out[family.fields["head_dim"]] = config.head_size
  return dict(sorted(out.items()))


def _field(config: ModelConfig, name: str) -> Any:
  """A field of a config; "moe.experts" is the field experts of the section moe."""
  section, _, inner = name.rpartition(".")
  return getattr(getattr(config, section) if section else config, inner)
