"""Methods of narrower use: the same form as `sapmerge.methods`, and the same laws."""

from sapmerge.contrib import ctm as _ctm
from sapmerge.contrib import emr as _emr
from sapmerge.contrib import pcb as _pcb
from sapmerge.contrib import wudi as _wudi
from sapmerge.contrib.ctm import *
from sapmerge.contrib.emr import *
from sapmerge.contrib.pcb import *
from sapmerge.contrib.wudi import *

__all__: list[str] = []
__all__ += _ctm.__all__
__all__ += _emr.__all__
__all__ += _pcb.__all__
__all__ += _wudi.__all__
