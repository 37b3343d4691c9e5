"""The named methods. Each is one function that returns a composition of primitives; read them as a table.

`__all__` feeds the command line, the documentation and the law tests. Methods of narrower use: `sapmerge.contrib`.
"""

from sapmerge.methods import anchored, averaging, consensus, layerwise, lora_native, pruning, shared_space, spectral
from sapmerge.methods.anchored import *
from sapmerge.methods.averaging import *
from sapmerge.methods.consensus import *
from sapmerge.methods.layerwise import *
from sapmerge.methods.lora_native import *
from sapmerge.methods.pruning import *
from sapmerge.methods.shared_space import *
from sapmerge.methods.spectral import *

__all__: list[str] = []
__all__ += anchored.__all__
__all__ += averaging.__all__
__all__ += consensus.__all__
__all__ += layerwise.__all__
__all__ += lora_native.__all__
__all__ += pruning.__all__
__all__ += shared_space.__all__
__all__ += spectral.__all__
