"""Several processes of one run: they join, share and compare values, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from igpo_jax import cli
from igpo_jax.errors import UserError
from igpo_jax.io.versions import source, versions
from igpo_jax.parallel.liveness import Watch
from igpo_jax.parallel.mesh import check_devices, over_processes
from igpo_jax.parallel.rendezvous import Connections, meet

# jax's own name for the first; the others go with it.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

JOIN_SECONDS = 300  # machines of a pod start one after the other
# The second net: a process that says nothing for so long is dead. Half of it can be over when a
# process is stopped, as jax sends a heartbeat twice in this time: the watch has to be faster.
HEARTBEAT_SECONDS = 90
SHUTDOWN_SECONDS = 120  # the first process still writes the report
# A collective fails at once when a process dies: the watch, which knows why, speaks first.
GRACE_SECONDS = 3.0


@contextlib.contextmanager
def joined(detect: bool = False) -> Iterator[None]:
  """Runs the body as one process of a run. When one process fails or dies, all of them end.

  The reason is printed by every process, and every process exits with the code of the one that
  failed. So no process waits in a collective that the failed one will never enter. A run of a
  single process is not affected.

  Args:
    detect: see `start`.
  """
  met = start(detect)
  try:
    check_devices()
    near = os.environ.get(ADDRESS, "").rpartition(":")[0].strip("[]")
    count = jax.process_count()
    watch = Watch(jax.process_index(), count, share, near) if count > 1 else None
  except RuntimeError:
    time.sleep(GRACE_SECONDS)  # a collective fails when a process dies: `met` knows which
    raise
  if met is not None:
    met.close()
  if watch is None:
    yield
    return
  try:
    check_versions()
    yield
  except SystemExit:  # all processes stop at the same step
    watch.done()
    raise
  except BaseException as caught:
    error, text = caught, str(caught)
    if not isinstance(error, UserError):
      time.sleep(GRACE_SECONDS)
      text = f"{type(error).__name__}: {text}"
    watch.fail(lambda: cli.explain(error), " ".join(text.split())[:1000])
  watch.done()


def start(detect: bool = False, seconds: int = JOIN_SECONDS) -> Connections | None:
  """Joins the processes of one run. Call it before anything asks jax for its devices.

  If the environment variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES
  and JAX_PROCESS_ID are set, they say who takes part. Otherwise, and with `detect`, jax finds the
  processes itself (TPU pods, Slurm, Kubernetes, ...). Otherwise the process is alone, and nothing
  happens. A second call does nothing.

  Args:
    detect: let jax find the processes.
    seconds: processes that have not come together after this time end with one line and exit
      code 1.

  Returns:
    The connections between the processes, to be closed once these have others; None for none.

  Raises:
    UserError: some of the variables are missing or make no sense, or are not the same for all; the
      port is taken; or there is nothing to detect.
  """
  if jax.distributed.is_initialized():
    return None
  where: dict[str, Any] = {}
  if ADDRESS in os.environ:
    where = _from_variables()
  elif not detect:
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
      line = "this is one of several Slurm tasks; without --distributed each is a run of its own"
      print(f"warning: {line}", file=sys.stderr, flush=True)
    return None
  # SIGTERM is ours (train/loop.py): jax's own service would swallow it between the stages.
  jax.config.update("jax_enable_preemption_service", False)
  late = threading.Timer(seconds, _too_late, (where, seconds))
  late.daemon = True
  late.start()
  met = None
  try:
    if where:
      host, _, port = where["coordinator_address"].rpartition(":")
      count, index = where["num_processes"], where["process_id"]
      met = meet(host.strip("[]"), int(port), count, index, (ADDRESS, COUNT, INDEX))
    _join(where, seconds)
  finally:
    late.cancel()
  return met


def _join(where: dict[str, Any], seconds: int) -> None:
  """Calls jax.distributed.initialize; `where` is {} if jax has to find the processes."""
  try:
    jax.distributed.initialize(
      **where,
      initialization_timeout=seconds + 60,  # past it jax aborts with a stack trace
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
  except (ValueError, RuntimeError, OSError, KeyError) as error:
    if where:
      raise UserError(f"joining the run at {where['coordinator_address']}: {error}") from error
    raise UserError(
      f"--distributed: jax finds no TPU pod, Slurm step or other cluster here ({error}); "
      f"set {ADDRESS}, {COUNT} and {INDEX}, or leave --distributed out"
    ) from error


def _from_variables() -> dict[str, Any]:
  """Arguments of jax.distributed.initialize from the three variables, checked."""
  address = os.environ[ADDRESS]
  try:
    count, index = int(os.environ[COUNT]), int(os.environ[INDEX])
  except (KeyError, ValueError):
    raise UserError(
      f"{ADDRESS} is set, so {COUNT} (how many processes) and {INDEX} (which one this is,"
      " from 0) should be numbers, too"
    ) from None
  if not 0 <= index < count:
    raise UserError(f"{INDEX}={index} is not one of {COUNT}={count} processes, counted from 0")
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"{ADDRESS}={address!r} should be HOST:PORT of process 0")
  return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _too_late(where: dict[str, Any], seconds: int) -> None:
  """Ends a process that still waits for the others; called in a thread of its own."""
  of = f" (process {where['process_id']} of {where['num_processes']})" if where else ""
  at = f" at {where['coordinator_address']}" if where else ""
  line = (
    f"error: the processes of this run did not come together{at} within {seconds} s; this one"
    f"{of} waited. Were all started, with the same address and count, and can they reach"
    " process 0's port?"
  )
  os.write(2, f"{line}\n".encode())
  os._exit(1)


# --- values that all processes share ------------------------------------------------------


def share(rows: Sequence[Any]) -> list[Any]:
  """The JSON values of all processes, in the order of the processes. A collective.

  Args:
    rows: this process's values, any number of them.
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


def from_first(decide: Callable[[], Any]) -> Any:
  """Calls `decide()` on process 0 and returns its result on every process. A collective.

  Decisions that depend on files are made this way, since two machines may see a network disk in
  different states.

  Args:
    decide: returns a JSON value; called on process 0 only.

  Raises:
    UserError: on every process, if `decide` raises a UserError on process 0.
  """
  if jax.process_count() == 1:
    return decide()
  outcome = []
  if jax.process_index() == 0:
    try:
      outcome = [{"value": decide()}]
    except UserError as error:
      outcome = [{"error": str(error)}]
  (outcome,) = share(outcome)
  if "error" in outcome:
    raise UserError(outcome["error"])
  return outcome["value"]


def agree(what: str, value: Any) -> None:
  """Checks that all processes have an equal JSON value. A collective.

  Args:
    what: the name of the value, for the message.
    value: this process's value.

  Raises:
    UserError: on every process, if one process has another value.
  """
  values = share([value])
  for index, other in enumerate(values):
    if other != values[0]:
      raise UserError(f"{what} of process {index} is not that of process 0: {other}, {values[0]}")


def check_versions() -> None:
  """Checks that all processes run the same code. A collective.

  Raises:
    UserError: on every process, if one of them has another version of Python, of a package that
      decides a run's numbers, or of this package's files.
  """
  first, *others = share([{**versions(), "igpo_jax's source": source()}])
  for index, other in enumerate(others, start=1):
    for name in first:
      if other.get(name) != first[name]:
        raise UserError(
          f"process {index} runs {name} {other.get(name)}, process 0 {name} {first[name]}: install "
          "the same on all machines"
        )
