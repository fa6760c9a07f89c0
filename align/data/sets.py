"""One evaluation set, or several by name."""

from collections.abc import Callable
from typing import Any

from align.errors import DataError


def of_each(datasets: Any, function: Callable[[Any], Any]) -> Any:
    """function(rows) of one set; of several (a dict, a DatasetDict) the same by name; None of None. DataError for names
    that metrics cannot have; an error in one of several sets names it."""
    if datasets is None:
        return None
    if not isinstance(datasets, dict):
        return function(datasets)
    if not datasets:
        raise DataError("eval_dataset is an empty dict: give at least one set, or leave it out")
    found = {}
    for name, rows in datasets.items():
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"the evaluation sets have names, which their metrics begin with; {name!r} is none")
        try:
            found[name] = function(rows)
        except DataError as error:
            raise DataError(f"evaluation set {name!r}: {error}") from error
    return found
