"""Several processes: how they find each other, and rows of text that all of them need."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpo_jax.cli import UserError
from igpo_jax.parallel.mesh import over_processes

# jax's own name for the first; the others go with it.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start(detect: bool = False) -> None:
  """Joins the processes of one run; call it before anything asks jax for its devices.

  With the environment variables JAX_COORDINATOR_ADDRESS (host:port of process 0),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID set, these are used. With `detect`, jax finds out
  for itself (TPU pods, Slurm, Kubernetes, ...). With neither, a process is alone and
  nothing happens; so it is at a second call.

  Raises:
    UserError: some of the variables are missing or are no numbers.
  """
  if jax.distributed.is_initialized():
    return
  if ADDRESS not in os.environ:
    if detect:
      jax.distributed.initialize()
    return
  try:
    count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
  except (KeyError, ValueError):
    raise UserError(
      f"{ADDRESS} is set, so {COUNT} (how many processes) and {INDEX} (which one this is,"
      " from 0) should be numbers, too"
    ) from None
  jax.distributed.initialize(os.environ[ADDRESS], count, index)


def share(rows: Sequence[Any]) -> list[Any]:
  """JSON values of every process, in the order of the processes; the same on each.

  A collective: every process calls it, with as many values as it has.
  """
  if jax.process_count() == 1:
    return list(rows)
  data = np.frombuffer(json.dumps(list(rows)).encode(), np.uint8)
  padded = np.zeros(int(over_processes(np.array(len(data)), np.max)), np.uint8)
  padded[: len(data)] = data
  lengths = multihost_utils.process_allgather(np.array(len(data)))
  parts = multihost_utils.process_allgather(padded)
  return [
    row
    for n, part in zip(lengths, parts, strict=True)
    for row in json.loads(np.asarray(part)[: int(n)].tobytes())
  ]
