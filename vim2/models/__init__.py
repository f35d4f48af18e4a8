"""Models; importing this registers them with timm."""
from typing import List

import timm

from .tsm2 import TSM2
from .vim import Vim
from .vim2 import VisionMambaMixer
from .vmamba import VMamba

__all__ = ['TSM2', 'VMamba', 'Vim', 'VisionMambaMixer', 'model_names']


def model_names() -> List[str]:
    """Of every family here, as timm knows them."""
    return [name for family in ('vim2', 'vmamba', 'vim') for name in timm.list_models(module=family)]
