"""``python -m titans_runtime`` is the command ``titans``."""

from titans_runtime.cli import main

raise SystemExit(main())
