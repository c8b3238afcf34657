"""The vocabulary of the line: values, errors, measurements, gates. Standard library and pydantic only."""
