"""Rehearses many command lines in one process of 64 fake devices; one JSON object on stdout.

What comes on stdin is a JSON list of [name, words of the command line, lower]; what goes out is
name -> {"page", "kernels", "sizes"} or {"error": the line a user would read}.
"""

from __future__ import annotations

import json
import os
import sys

FAKE = "--xla_force_host_platform_device_count=64"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE}"

from igpo_jax import cli  # noqa: E402  after the flags
from igpo_jax.errors import UserError  # noqa: E402
from igpo_jax.flags import parse  # noqa: E402
from igpo_jax.rehearse import FLAGS, machine_for, page, rehearse  # noqa: E402


def run(words, lower):
  try:
    config, _ = parse(FLAGS, ["rehearse", *words], "")
    machine = machine_for(config, FLAGS.devices, FLAGS.processes, FLAGS.chip)
    facts = rehearse(config, machine, FLAGS.share, FLAGS.hinted, lower)
  except UserError as error:
    return {"error": str(error)}
  named = next(word.partition("=")[2] for word in words if word.startswith("--config="))
  return {"page": page(facts, named), "kernels": facts["kernels"], "sizes": facts["sizes"]}


def main():
  cases = json.load(sys.stdin)
  print(json.dumps({name: run(words, lower) for name, words, lower in cases}))


if __name__ == "__main__":
  cli.run(main)
