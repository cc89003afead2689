"""``adamal bench``: how fast a step is, against the Adams one could use instead.

:mod:`.cases` says what is timed and :mod:`.contenders` who is; :mod:`.measure` times a step,
:mod:`.run` whole cases; :mod:`.report` and :mod:`.plot` show what was found.
"""

from .command import add_arguments, main

__all__ = ["add_arguments", "main"]
