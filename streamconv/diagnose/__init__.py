"""What is said of checkpoints: their health, the recipes that fit, drafts of new ones, reports."""
