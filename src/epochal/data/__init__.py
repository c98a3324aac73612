"""From text files to a token store, and from there to batches."""

from epochal.data.store import TokenStore

__all__ = ["TokenStore"]
