"""Benchmarks, one `bench_<family>.py` a family over one harness; `torchlin bench <family>` runs them."""
