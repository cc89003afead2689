"""What an NVIDIA GPU is needed for, the most valuable first: ``python -m benchmarks.gpu_check``.

:mod:`.sections` is the list of what is run, and :mod:`.runner` runs it within a budget of time.
Each section is a process of its own: the package's command line, or one of the programs here,
:mod:`.build`, :mod:`.parity`, :mod:`.tests` and :mod:`.memcheck`.
"""
