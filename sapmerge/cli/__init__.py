"""The command line: `sapmerge merge`, `inspect`, `methods`, `compare`, `convert`, `verify`,
`reproduce`, `score`, `round`, `demo`.

program.py     what all commands share: the parser, and errors as one line
merging.py     merge
looking.py     inspect
listing.py     methods; catalogue.py reads them as text
comparing.py   compare
converting.py  convert
checking.py    verify, reproduce
scoring.py     score
rounds.py      round
showing.py     demo
arguments.py   adapters, weights, ranks and policies as they are typed
models.py      the base model and the anchors
choices.py     what flags may be given
flags.py       messages of the library, said in flags
recipe_files.py   merges written down as YAML
recipes.py     methods by name, by recipe, or of a module of the user's

What a command works with is imported when it runs: `--help` does not wait for torch.
"""

from sapmerge.cli.program import main

__all__ = ["main"]
