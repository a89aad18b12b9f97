"""What a conversion is made of beside its tensors: sides, files that go along, casts."""
