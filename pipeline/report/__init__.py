"""Reports: a record rendered for people and for CI."""
