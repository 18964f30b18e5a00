"""Moved to `umm.pretrained`."""

from umm.pretrained import load_pretrained, locate, sha256_of  # noqa: F401
