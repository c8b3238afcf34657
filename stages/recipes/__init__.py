"""Training recipes: what loss one batch has, under which threat."""
