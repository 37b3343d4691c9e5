"""`python -m sapmerge` is `sapmerge`."""

from sapmerge.cli import main

raise SystemExit(main())
