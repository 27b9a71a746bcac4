"""Weights in and out: Hugging Face safetensors, Orbax checkpoints, PEFT adapters."""

FORMATS = ("hf", "orbax", "peft")
THREADS = 4  # blocks of a file in flight
