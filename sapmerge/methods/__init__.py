"""The named methods. Each is one function that returns a composition of primitives; read them as a table.

`__all__` feeds the command line, the documentation and the law tests. Methods of narrower use are in `sapmerge.contrib`.
"""

from sapmerge.methods import anchored, averaging, pruning, shared_space
from sapmerge.methods.anchored import *
from sapmerge.methods.averaging import *
from sapmerge.methods.pruning import *
from sapmerge.methods.shared_space import *

__all__: list[str] = []
__all__ += anchored.__all__
__all__ += averaging.__all__
__all__ += pruning.__all__
__all__ += shared_space.__all__
