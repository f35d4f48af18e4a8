"""Errors and warnings about time series."""
import re

__all__ = ['SeriesError', 'SeriesWarning']

_HINT = re.compile(r'⟨(\w+)(?:=([^⟩]*))?⟩')


def _python(match: re.Match) -> str:
    name, value = match.groups()
    if value is None:
        return name
    return f'{name}={value if value in ("True", "False") else repr(value)}'


def _option(match: re.Match) -> str:
    name, value = match[1].replace('_', '-'), match[2]
    if value in ('True', 'False'):
        return f'--{name}' if value == 'True' else f'--no-{name}'
    if not value:
        return f'--{name}'
    return f'--{name} {value}' if re.fullmatch(r'[\w./+-]+', value) else f"--{name} '{value}'"


class _Hinted(Exception):
    """A message that names arguments as `⟨name⟩` or `⟨name=value⟩`: for Python, and for a command line."""

    def __init__(self, message: str):
        self.message = ' '.join(message.split())
        super().__init__(_HINT.sub(_python, self.message))

    def command_line(self) -> str:
        """The message with the arguments as options, `--name value`."""
        return _HINT.sub(_option, self.message)


class SeriesError(_Hinted, ValueError):
    """A time series that cannot be used; the message names what is wrong, where, and the argument that may mend it."""


class SeriesWarning(_Hinted, UserWarning):
    """A forecaster or a series that can be used, and probably should not be as it is."""
