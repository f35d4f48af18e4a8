"""Stands in for mamba_ssm, causal_conv1d and VMamba's compiled scans in other people's code, on any device.

    import vim2.compat
    vim2.compat.install()
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn     # runs vim2's kernels, CPU included

or, without touching the code, `python -m vim2.compat SCRIPT ARGS`. Packages that are installed and can be imported are
left alone unless `install(override=True)` says otherwise. What Mamba-2 needs (SSD) is not there, nor a complex A:
asking for it is an error that says so. docs/compat.md has the list.
"""
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple, Union

__all__ = ['install', 'uninstall']

_SCAN = 'selective_scan_fn selective_scan_ref mamba_inner_fn mamba_inner_ref mamba_inner_fn_no_out_proj ' \
        'bimamba_inner_fn bimamba_inner_ref'.split()
_CONV = 'causal_conv1d_fn causal_conv1d_ref causal_conv1d_update causal_conv1d_update_ref'.split()
_NORM = 'RMSNorm layer_norm_fn layer_norm_ref rms_norm_fn rms_norm_ref'.split()
_UPDATE = ['selective_state_update', 'selective_state_update_ref']

# Their modules: where each name comes from, as (our module, its name there); a bare name is the same in both.
_MODULES: Dict[str, List[Tuple[str, List[Union[str, Tuple[str, str]]]]]] = {
    'mamba_ssm': [('scan', ['selective_scan_fn', 'mamba_inner_fn', 'bimamba_inner_fn']), ('mamba', ['Mamba'])],
    'mamba_ssm.ops': [],
    'mamba_ssm.ops.selective_scan_interface': [('scan', _SCAN), ('conv', ['causal_conv1d_fn'])],
    'mamba_ssm.ops.triton': [],
    'mamba_ssm.ops.triton.selective_state_update': [('scan', _UPDATE)],
    'mamba_ssm.ops.triton.layer_norm': [('norm', _NORM)],
    'mamba_ssm.ops.triton.layernorm': [('norm', _NORM)],
    'mamba_ssm.modules': [],
    'mamba_ssm.modules.mamba_simple': [
        ('mamba', ['Mamba', ('Block', 'BlockV1')]), ('scan', [*_SCAN, 'selective_state_update']),
        ('conv', ['causal_conv1d_fn', 'causal_conv1d_update']), ('norm', _NORM)],
    'mamba_ssm.modules.block': [('mamba', ['Block']), ('norm', _NORM)],
    'mamba_ssm.utils': [],
    'mamba_ssm.utils.generation': [('mamba', ['GenerationMixin', 'InferenceParams'])],
    'mamba_ssm.utils.hf': [('mamba', ['load_config_hf', 'load_state_dict_hf'])],
    'causal_conv1d': [('conv', _CONV)],
    'causal_conv1d.causal_conv1d_interface': [('conv', _CONV)],
    'selective_scan_cuda': [('extensions', [('fwd', 'mamba_fwd'), ('bwd', 'mamba_bwd')])],
    'selective_scan_cuda_core': [('extensions', [('fwd', 'core_fwd'), ('bwd', 'core_bwd')])],
    'selective_scan_cuda_oflex': [('extensions', [('fwd', 'oflex_fwd'), ('bwd', 'core_bwd')])],
}
_PACKAGES = [name for name in _MODULES if '.' not in name]
_VERSIONS = {'mamba_ssm': '2.3.2+vim2', 'causal_conv1d': '1.6.1+vim2'}  # whose signatures these are


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules of the packages that are stood in for."""

    def __init__(self):
        self.packages: List[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        if name.partition('.')[0] not in self.packages:
            return None
        if name not in _MODULES:
            raise ModuleNotFoundError(_absent(name), name=name)
        package = any(other.startswith(name + '.') for other in _MODULES)
        return importlib.machinery.ModuleSpec(name, self, origin='vim2.compat', is_package=package)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        for source, names in _MODULES[name]:
            ours = importlib.import_module(f'vim2.compat.{source}')
            for pair in names:
                theirs, own = (pair, pair) if isinstance(pair, str) else pair
                setattr(module, theirs, getattr(ours, own))
        if name in _VERSIONS:
            module.__version__ = _VERSIONS[name]
        module.__doc__ = f'{name}, by vim2.compat.'

        def missing(attribute: str) -> Any:
            if attribute.startswith('__'):
                raise AttributeError(f'module {name!r} has no attribute {attribute!r}')
            raise ImportError(_absent(f'{name}.{attribute}'), name=name)

        module.__getattr__ = missing


def _absent(name: str) -> str:
    why = ' (Mamba-2 and its SSD are not there)' if any(
        part in name.lower() for part in ('mamba2', 'ssd', 'gated', 'chunk')) else ''
    return f'vim2.compat stands in for {name.partition(".")[0]}, but it has no {name}{why}: docs/compat.md has the list'


_finder = _Finder()


def _works(package: str) -> bool:
    """Whether it is there and can be imported; a package whose compiled parts are missing is not."""
    if package in sys.modules:
        return True
    try:
        if importlib.util.find_spec(package) is None:
            return False
        importlib.import_module(package)
    except Exception:  # ImportError, OSError of a library, or what a package raises that finds no GPU
        _forget(package)
        return False
    return True


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(package + '.')]:
        del sys.modules[name]


def install(override: bool = False, quiet: bool = False) -> List[str]:
    """From now on importing mamba_ssm, causal_conv1d, selective_scan_cuda and VMamba's two gives vim2's stand-ins.

    Args:
        override: also where the package is installed and can be imported. What was imported from it before stays.
        quiet: do not say, on stderr, what stands in for what.

    Returns:
        The packages that are stood in for.
    """
    new, left = [], []
    for package in _PACKAGES:
        if package in _finder.packages:
            continue
        if not override and _works(package):
            left.append(package)
            continue
        _forget(package)
        new.append(package)
    _finder.packages += new
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if new and not quiet:
        text = f'vim2.compat stands in for {", ".join(new)}'
        print(text + (f'; {", ".join(left)} installed, left alone' if left else ''), file=sys.stderr)
    return list(_finder.packages)


def uninstall() -> None:
    """Take the stand-ins away. What was imported from them stays."""
    for package in _finder.packages:
        _forget(package)
    _finder.packages.clear()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
