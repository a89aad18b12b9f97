"""Tensors that are not there yet: nodes with a dtype and a shape, the ops between them, and how any region of one is made."""
