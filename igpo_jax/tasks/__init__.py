"""Tasks, one file each: problems, traces, verifier, reward parts, alphabet and trim rules.

Importing this package registers the tasks of all its files (`data.task_registry`). So a new task
is a new file here, and nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
  importlib.import_module(f"{__name__}.{_module.name}")
