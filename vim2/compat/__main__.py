"""Run a script that imports mamba_ssm, causal_conv1d or VMamba's scans with vim2's stand-ins for them.

    python -m vim2.compat [--override] SCRIPT [ARGS …]
    python -m vim2.compat [--override] -m MODULE [ARGS …]
"""
import sys

from vim2._script import run_script
from . import install


def main() -> None:
    args = sys.argv[1:]
    override = args[:1] == ['--override']
    run_script(args[1:] if override else args, 'python -m vim2.compat', __doc__,
               lambda: install(override=override))


if __name__ == '__main__':
    main()
