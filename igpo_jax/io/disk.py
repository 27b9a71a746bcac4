"""What a disk says when it fails."""

from __future__ import annotations

import errno

# When it is full, read-only, broken or away.
FAILURES = (
  errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN,
  errno.ETIMEDOUT,
)  # fmt: skip
