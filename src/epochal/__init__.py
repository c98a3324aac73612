"""epochal: pre-training recipes for finite text and unlimited compute."""

__version__ = "0.1.0"
