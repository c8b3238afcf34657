"""The engine: plans the line, runs it step by step, and remembers every outcome."""
