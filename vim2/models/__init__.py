"""Models; importing this registers them with timm."""
from .tsm2 import TSM2
from .vim import Vim
from .vim2 import VisionMambaMixer
from .vmamba import VMamba

__all__ = ['TSM2', 'VMamba', 'Vim', 'VisionMambaMixer']
