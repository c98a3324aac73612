"""Text and soft targets drawn from models."""
