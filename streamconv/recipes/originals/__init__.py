"""Checkpoints as their authors published them, and Hugging Face's."""
