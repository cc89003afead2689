"""Benchmarks: of the step (`make bench`), of the host's work, and of the paper's claims."""
