"""The command line: each command is a few lines over the API. Errors in the house style, no tracebacks for them.

Exit codes: 0 done, 1 the library refused (model, data or a check), 2 the command line was wrong.
"""

from reward_lens.cli import behaviour, dictionaries, looking, readouts, reporting, studies, words
from reward_lens.cli.common import app

__all__ = ["app", "behaviour", "dictionaries", "looking", "readouts", "reporting", "studies", "words"]
