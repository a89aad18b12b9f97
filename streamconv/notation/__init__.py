"""The language of recipes: name patterns, layouts, expressions. Strings and integers only."""
