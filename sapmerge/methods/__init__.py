"""The named methods. Each is one function that returns a composition of primitives;
read them as a table.

A method is named once, in the `__all__` of its file. `__all__` here feeds the command line,
recipes, the documentation and the law tests. Methods of narrower use: `sapmerge.contrib`.
"""

from sapmerge.methods import anchored as _anchored
from sapmerge.methods import averaging as _averaging
from sapmerge.methods import lora_native as _lora_native
from sapmerge.methods import pruning as _pruning
from sapmerge.methods import shared_space as _shared_space
from sapmerge.methods import spectral as _spectral
from sapmerge.methods.anchored import *
from sapmerge.methods.averaging import *
from sapmerge.methods.lora_native import *
from sapmerge.methods.pruning import *
from sapmerge.methods.shared_space import *
from sapmerge.methods.spectral import *

__all__: list[str] = []
__all__ += _anchored.__all__
__all__ += _averaging.__all__
__all__ += _lora_native.__all__
__all__ += _pruning.__all__
__all__ += _shared_space.__all__
__all__ += _spectral.__all__
