"""``python -m titans_runtime`` is the command ``titans``."""

from titans_command import main

raise SystemExit(main())
