"""Fine-tunes an autoregressive checkpoint that has become a diffusion model.

    python -m igpo_jax.convert --as-diffusion --source=Qwen2.5-0.5B --target=MODEL
    python -m igpo_jax.main --config=configs/a2d_sft.py:MODEL,DATA --workdir=DIR

MODEL is a directory that `igpo_jax.convert --as-diffusion` made (docs/models.md), DATA a source of
records (docs/data.md). All parameters are trained: attention both ways is new to every layer.
"""

from igpo_jax.config import default_config


def get_config(argument="model,jsonl:train.jsonl"):
  model, _, data = argument.partition(",")
  config = default_config()
  config.stages = ("sft",)
  config.init_from = model
  config.data.sft = data
  config.data.prompt_buckets = (64, 128, 256)
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.model.attention = "auto"
  config.mesh.data = 1
  config.mesh.fsdp = -1

  config.sampler.gen_length = 256
  config.sampler.schedule = "rounded"
  config.sampler.temperature = 0.0
  config.sft.epochs = 3.0
  config.sft.batch_size = 64
  config.sft.micro_batches = 0
  config.sft.response_lengths = (64, 128, 256)
  config.sft_optimizer.learning_rate = 1e-4
  config.sft_optimizer.warmup_steps = 50
  config.sft_optimizer.schedule = "cosine"
  return config
