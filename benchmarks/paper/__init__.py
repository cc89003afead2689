"""Every claim of the paper that can be tested, tested: ``python -m benchmarks.paper --help``.

The paper is *A New Perspective in Understanding of Adam-Type Algorithms and Beyond*. An
experiment is a file that says what is measured and what the paper claims of it:
:mod:`.nonconvergence`, :mod:`.mirror`, :mod:`.swaps`, :mod:`.diffusion` and :mod:`.images`.
:mod:`.experiment` is what they share, :mod:`.summary` puts their claims into one table.
"""
