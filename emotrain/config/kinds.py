"""What the type of a setting says of its value. A plain `int` or `float` is positive."""

from __future__ import annotations

from typing import Annotated

AT_LEAST_0, PATH = "at least 0", "path"
NonNegativeInt = Annotated[int, AT_LEAST_0]
NonNegativeFloat = Annotated[float, AT_LEAST_0]
PathText = Annotated[str, PATH]
"""A path; `~` is the home folder."""
Counts = tuple[tuple[str, int], ...]
"""Numbers by name, in order; a file writes `{name: 2}`."""
Names = tuple[str, ...]
Paths = Annotated[Names, PATH]
"""`~` is the home folder in each of them."""
Shares = tuple[float, ...]
"""Each above 0 and up to 1."""
