"""Rich's progress display, but for one line of it.

Imports rich, so it is imported where a bar is made.
"""

from __future__ import annotations

from rich.progress import Progress


class Bar(Progress):
    """Where no terminal is, rich shows the last state without a line's end and then ends that line: here only if there
    is one.
    """

    def stop(self) -> None:
        """Stop the display."""
        shown = not self.live.transient and any(task.visible for task in self.tasks)
        if shown or self.console.is_interactive:
            super().stop()
        else:
            self.live.stop()
