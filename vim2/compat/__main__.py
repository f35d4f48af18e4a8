"""Run a script that imports mamba_ssm, causal_conv1d or VMamba's scans with vim2's stand-ins for them.

    python -m vim2.compat [--override] SCRIPT [ARGS …]
    python -m vim2.compat [--override] -m MODULE [ARGS …]
"""
import os
import runpy
import sys

from . import install


def main() -> None:
    args = sys.argv[1:]
    override = args[:1] == ['--override']
    args = args[1:] if override else args
    module = args[:1] == ['-m']
    args = args[1:] if module else args
    if not args or args[0].startswith('-'):
        print(__doc__.strip(), file=sys.stderr)
        raise SystemExit(0 if args[:1] in (['-h'], ['--help']) else 2)
    if not module and not os.path.exists(args[0]):
        print(f'python -m vim2.compat: there is no script {args[0]}', file=sys.stderr)
        raise SystemExit(2)
    install(override=override)
    sys.argv = args
    if module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args[0], run_name='__main__', alter_sys=True)
    else:  # what `python SCRIPT` puts first
        sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
        runpy.run_path(args[0], run_name='__main__')


if __name__ == '__main__':
    main()
