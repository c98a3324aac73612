"""Text to documents to token stores to the batch at step t."""

from epochal.data.store import TokenStore

__all__ = ["TokenStore"]
