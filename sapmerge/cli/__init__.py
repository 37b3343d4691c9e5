"""The command line: `sapmerge merge`, `inspect`, `methods`, `compare`, `verify`, `reproduce`,
`score`, `round`, `demo`.

program.py     what all commands share: the parser, and errors as one line
merging.py     merge
looking.py     inspect
listing.py     methods
comparing.py   compare
checking.py    verify, reproduce
scoring.py     score
rounds.py      round
showing.py     demo
arguments.py   adapters, weights, ranks and policies as they are typed
models.py      the base model and the anchors
flags.py       messages of the library, said in flags
recipe_files.py   merges written down as YAML
recipes.py     methods by name, by recipe, or of a module of the user's
"""

from sapmerge.cli.program import main

__all__ = ["main"]
