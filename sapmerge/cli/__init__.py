"""The command line.

program.py     what all commands share: errors as one line
commands.py    the commands, and the parser made of them
merging.py     merge
comparing.py   compare
listing.py     methods; catalogue.py reads them as text
looking.py     inspect
checking.py    check, verify, reproduce
choosing.py    anchors
scoring.py     score
caching.py     cache
rounds.py      round
clients.py     neighbours, prompts
converting.py  convert
showing.py     demo
completing.py  completion; completions.py has the scripts
arguments.py   adapters, weights, ranks and policies as they are typed
hub.py         hf://user/name, where a folder may stand
models.py      the base model and the anchors
pages.py       --html
choices.py     what flags may be given
flags.py       messages of the library, said in flags
recipe_files.py   merges written down as YAML
recipes.py     methods by name, by recipe, or of a module of the user's

What a command works with is imported when it runs: `--help` does not wait for torch.
"""

from sapmerge.cli.program import main

__all__ = ["main"]
