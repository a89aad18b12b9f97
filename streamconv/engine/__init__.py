"""The engine runs a plan. It knows files, offsets and nodes; names, recipes and containers are unknown here."""
