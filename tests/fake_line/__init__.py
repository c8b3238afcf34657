"""A line of five tiny stages without machine learning: real files, real scratch, deliberate pauses and faults."""
