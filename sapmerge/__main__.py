"""`python -m sapmerge` is `sapmerge`."""

from __future__ import annotations

from sapmerge.cli import main

raise SystemExit(main())
