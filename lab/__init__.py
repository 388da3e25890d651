"""The evidence: the judge (reader), scores (evaluate), claims (study, scale, actors, blocks), what the
numbers say (tables, verdicts, window, plots, report), speed (bench, bench_gpu), what a GPU sends (parcel)."""
