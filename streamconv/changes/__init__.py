"""What changed between two checkpoints, tensor by tensor, and by how much."""
