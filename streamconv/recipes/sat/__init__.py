"""SwissArmyTransformer's models and Hugging Face's."""
