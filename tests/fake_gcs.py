"""gs:// as a folder: objects that appear when they are closed and are never appended to."""

from __future__ import annotations

import io
import os
import pathlib

from etils.epath import backend, gpath


class _Object(io.BytesIO):
  """What is written becomes the object at once, when it is closed."""

  def __init__(self, path: pathlib.Path):
    super().__init__()
    self._path = path

  def close(self):
    if not self.closed:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._path.write_bytes(self.getvalue())
    super().close()


class ObjectStore(backend._OsPathBackend):
  """An epath backend; keeps gs://BUCKET/NAME in FOLDER/BUCKET/NAME.

  Attributes:
    writes: names of the objects written, in order.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder, self.writes = folder, []

  def local(self, path) -> pathlib.Path:
    text = os.fspath(path)
    assert text.startswith("gs://"), f"{text} is no object's name"
    return self.folder / text.removeprefix("gs://")

  def open(self, path, mode):
    if "a" in mode or "+" in mode:
      raise io.UnsupportedOperation(f"objects cannot be appended to: {path}")
    if "w" not in mode:
      return open(self.local(path), mode)
    self.writes.append(os.fspath(path))
    file = _Object(self.local(path))
    return file if "b" in mode else io.TextIOWrapper(file, "utf-8", write_through=True)

  def exists(self, path):
    return self.local(path).exists()

  def stat(self, path):
    return super().stat(self.local(path))

  def isdir(self, path):
    return self.local(path).is_dir()

  def listdir(self, path):
    return os.listdir(self.local(path))

  def glob(self, path):
    raise NotImplementedError

  def makedirs(self, path, **kwargs):
    pass  # there are no directories

  def mkdir(self, path, **kwargs):
    pass

  def remove(self, path):
    self.local(path).unlink()

  def replace(self, path, dst):
    self.local(path).replace(self.local(dst))


def install(monkeypatch, folder: pathlib.Path) -> ObjectStore:
  """Makes gs:// paths name objects in `folder`."""
  store = ObjectStore(folder)
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
  return store
