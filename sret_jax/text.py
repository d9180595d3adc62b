"""Figures and tables as text for people."""


def duration(seconds: float) -> str:
    """3725.0 -> '1h02m'; 65 -> '1m05s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
