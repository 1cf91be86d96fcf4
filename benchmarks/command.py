"""How every benchmark ends: a user's mistake and Ctrl-C are one line and an exit code, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from titans_runtime.errors import TitansError

_INTERRUPTED = 130
"""As a shell has it."""


def conclude(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main`` and leave the process.

    Args:
        main: the command; what it returns is the exit code, None is 0.
    """
    try:
        code = main()
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    raise SystemExit(code)
