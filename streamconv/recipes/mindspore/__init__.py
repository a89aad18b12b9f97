"""MindSpore's models (mindformers) and Hugging Face's."""
