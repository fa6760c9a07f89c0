"""The date that some chat templates write into every conversation (Llama 3.2 and 3.3, GPT-OSS): one for a whole run,
also where it is resumed on another day."""

from datetime import date, datetime
from typing import Any

_day: date | None = None


def writes_date(tokenizer: Any) -> bool:
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def day() -> date:
    """The date that is written."""
    return _day or date.today()


def set_day(first: date | None) -> None:
    """first: on which the run began; None for today, whenever that is."""
    global _day
    _day = first


def strftime_now(form: str) -> str:
    """The template's function of this name."""
    return datetime.combine(day(), datetime.now().time()).strftime(form)
