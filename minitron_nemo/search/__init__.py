"""Which shape: the ones within a budget, cut from one file of Scores, distilled briefly, the weakest dropped by rungs.

    grid and budget -> candidates -> (cut, measure) -> rung: distil, measure, keep the best -> ... -> table, best.yaml

A candidate is a recipe with a run directory of its own, `RUN/search/NAME`; `minitron run` makes and trains it like any
other. Nothing here builds, cuts or trains a model.
"""
