"""Raw user feedback in, training data out: schema, readers, validation, splits, sampling and the data card.

`rluf.prepare.pipeline.build_data_set` runs all passes on Ray Data; the other modules are pure and import no ray.
"""
