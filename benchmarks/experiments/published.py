"""What the tasks' sources report, at other sizes and budgets: compare shapes, not digits."""

PUBLISHED: dict[str, tuple[str, ...]] = {}
