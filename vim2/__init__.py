"""ViM2 and MambaMixer: dual selection over tokens and channels. `import vim2` registers every model with timm."""
from . import hub, layers, models, ops
from .pretrained import list_pretrained

__version__ = '0.1.0'
__all__ = ['hub', 'layers', 'list_pretrained', 'models', 'ops']
