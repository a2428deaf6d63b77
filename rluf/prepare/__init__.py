"""Raw user feedback in, training data out: schema, readers, validation, splits, sampling and the data card.

`rluf.prepare.pipeline.prepare` runs the whole on Ray Data; every other module here is pure and imports no ray.
"""
