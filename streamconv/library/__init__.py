"""What libraries know of their models, asked without data."""
