"""Checkpoints that trainers leave: cut over ranks, in flat partitions, among the state of optimizers."""
