"""A module a chapter, named after its notebook with a `c` before it: what was fixed before the chapter's runs.

`STUDIES` are the grids it trains or shares, each a function `study(scale) -> list[RunConfig]`; `CLAIMS` its claims with
their criteria. A new chapter needs its notebook and its module here and nothing else; `studies` finds it.
"""
