"""IGPO on GSM8K with a model of 0.6 billion parameters: real language on one small chip.

    python -m igpo_jax.main --config=configs/a2d_gsm8k.py:DATA,HARDWARE --workdir=DIR

DATA (data, if none is given) holds A2D-Qwen3-0.6B/, a masked diffusion model made of Qwen3-0.6B
(dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1 on the Hugging Face hub, or one of your own:
docs/models.md), and gsm8k/{train,test}.jsonl. Any A2D model does, with --config.init_from=DIR.

HARDWARE is one of
    v5e      LoRA on the TPU v5e chips there are, one or more (Colab has one)
    v5e-8    full fine-tuning on 8 of them
    t4       LoRA on a T4 of 16 GB: an eighth of the work a step, a quarter of the steps
    l4       LoRA on an L4 of 24 GB
    a100     LoRA on an A100 of 40 GB
    gpu-8    full fine-tuning on 8 GPUs of 40 GB or more
    gpu      LoRA on the GPUs there are; also if none is named
A short SFT on the train split comes first: it teaches the form of GSM8K's answers. Then RL on the
same questions, whose traces are the hints. Mesh, slices and micro-batches follow from the devices.
docs/scaling.md has memory and time. Nobody has published IGPO on this model: rates are untried.
"""

from igpo_jax.config import default_config
from igpo_jax.errors import UserError

HARDWARE = ("v5e", "v5e-8", "t4", "l4", "a100", "gpu-8", "gpu")
KINDS = {"a100": "a100-40", "gpu-8": "a100-40"}  # of mesh.hardware, where it is another name


def get_config(argument="data"):
  data, _, hardware = argument.partition(",")
  hardware = hardware or "gpu"
  if hardware not in HARDWARE:
    raise UserError(f"--config: hardware {hardware!r} is not one of {', '.join(HARDWARE)}")
  config = default_config()
  config.init_from = f"{data}/A2D-Qwen3-0.6B"
  train = f"jsonl:{data}/gsm8k/train.jsonl?format=gsm8k&strip_calculator=true"
  config.data.sft = config.data.rl = train
  config.data.eval = (f"gsm8k=jsonl:{data}/gsm8k/test.jsonl?format=gsm8k",)
  config.data.prompt_buckets = (64, 96, 128, 192, 256)

  # Qwen3-0.6B's; read from `init_from` when it is there.
  model = config.model
  model.family = "a2d_qwen3"
  model.d_model = 1024
  model.n_layers = 28
  model.n_heads = 16
  model.n_kv_heads = 8
  model.head_dim = 128
  model.mlp_hidden = 3072
  model.vocab_size = 151936
  model.mask_id = 151669
  model.eos_id = 151643
  model.stop_ids = (151643, 151645)  # <|endoftext|>, <|im_end|>
  model.rope_theta = 1_000_000.0
  model.rms_norm_eps = 1e-6
  model.tie_embeddings = True
  model.dtype = "bfloat16"
  model.remat = "full"
  model.attention = "auto"
  if hardware.endswith("-8"):
    model.param_dtype = "float32"
  else:
    model.param_dtype = "bfloat16"
    model.lora.rank = 64
    model.lora.alpha = 64.0

  sampler = config.sampler
  sampler.gen_length = 256
  sampler.block_length = 32
  sampler.steps = 128
  sampler.schedule = "rounded"
  sampler.temperature = 1.0

  config.sft.steps = 200
  config.sft.batch_size = 32
  config.sft.response_lengths = (128, 256)
  config.sft_optimizer.learning_rate = 1e-4 if model.lora.rank else 2e-5
  config.sft_optimizer.warmup_steps = 20
  config.sft_optimizer.schedule = "cosine"
  config.hints.hide_answer_value = True
  config.rl.steps = 200
  config.rl.prompts_per_step = 64 if hardware.endswith("-8") else 16
  config.rl.group_size = 8
  config.rl_optimizer.learning_rate = 1e-5 if model.lora.rank else 1e-6
  config.rl_optimizer.warmup_steps = 20

  if hardware == "t4":  # no units for bfloat16: a step of 16 prompts would take half an hour
    config.rl.steps, config.rl.prompts_per_step, sampler.steps = 50, 4, 64

  config.mesh.hardware = KINDS.get(hardware, hardware.removesuffix("-8"))
  config.mesh.devices = 8 if hardware.endswith("-8") else 0
  # Known once the devices are.
  config.mesh.data = config.mesh.fsdp = 0
  config.rl.sample_slices = config.rl.micro_batches = config.sft.micro_batches = 0
  config.eval.batch_size = 0
  config.checkpoint.every = 20
  return config
