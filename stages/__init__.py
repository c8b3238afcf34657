"""The five stages of the line, one module each, and below them the libraries they are made of.

Only the stage modules (`search`, `train`, `compress`, `validate`, `export`) and the command modules beside them import
`pipeline.core`; the subpackages import neither `pipeline` nor `targets` and could be lifted out and published.
"""
