"""Tasks, a file each: problems, traces, verifier, reward parts, alphabet and trim rules.

Importing this package registers all of them (`data.task_registry`). A new file is a new task.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
  importlib.import_module(f"{__name__}.{_module.name}")
