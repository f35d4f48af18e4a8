"""Run a script that uses timm, such as timm's own train.py, validate.py and benchmark.py, with the models of vim2.

    python -m vim2 SCRIPT [ARGS …]
    python -m vim2 -m MODULE [ARGS …]
"""
import sys

from ._script import run_script

if __name__ == '__main__':  # `python -m vim2` has imported the package, which registers the models
    run_script(sys.argv[1:], 'python -m vim2', __doc__)
