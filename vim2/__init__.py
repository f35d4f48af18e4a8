"""ViM2 and MambaMixer: dual selection over tokens and channels. `import vim2` registers every model with timm."""
from . import layers, models, ops

__version__ = '0.1.0'
__all__ = ['layers', 'models', 'ops']
