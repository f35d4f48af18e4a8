"""Running other people's scripts as `python SCRIPT` and `python -m MODULE` would."""
import os
import runpy
import sys
from typing import Callable, List

__all__ = ['run_script']


def run_script(args: List[str], prog: str, usage: str, prepare: Callable[[], object] = lambda: None) -> None:
    """Run `SCRIPT [ARGS …]` or `-m MODULE [ARGS …]` as the main program.

    Args:
        args: the command line, without this program's own options.
        prog, usage: this program's name, and what is shown where the command line names no script.
        prepare: called before the script, if there is one.
    """
    module = args[:1] == ['-m']
    args = args[1:] if module else args
    if not args or args[0].startswith('-'):
        print(usage.strip(), file=sys.stderr)
        raise SystemExit(0 if args[:1] in (['-h'], ['--help']) else 2)
    if not module and not os.path.exists(args[0]):
        print(f'{prog}: there is no script {args[0]}', file=sys.stderr)
        raise SystemExit(2)
    prepare()
    sys.argv = args
    if module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args[0], run_name='__main__', alter_sys=True)
    else:  # what `python SCRIPT` puts first
        sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
        runpy.run_path(args[0], run_name='__main__')
