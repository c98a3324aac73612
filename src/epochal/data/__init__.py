"""From text files to a token store, and from it to the batch at step t."""

from epochal.data.store import TokenStore

__all__ = ["TokenStore"]
