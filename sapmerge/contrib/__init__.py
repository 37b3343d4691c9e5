"""Methods of narrower use: the same form as `sapmerge.methods`, and the same laws."""

from sapmerge.contrib import adamerging as _adamerging
from sapmerge.contrib import clair as _clair
from sapmerge.contrib import ctm as _ctm
from sapmerge.contrib import emr as _emr
from sapmerge.contrib import fedlora as _fedlora
from sapmerge.contrib import gradpruner as _gradpruner
from sapmerge.contrib import lorahub as _lorahub
from sapmerge.contrib import loraprune as _loraprune
from sapmerge.contrib import lorm as _lorm
from sapmerge.contrib import movement as _movement
from sapmerge.contrib import nsc as _nsc
from sapmerge.contrib import pcb as _pcb
from sapmerge.contrib import pico as _pico
from sapmerge.contrib import ram as _ram
from sapmerge.contrib import score as _score
from sapmerge.contrib import spectral_surgery as _spectral_surgery
from sapmerge.contrib import star as _star
from sapmerge.contrib import wudi as _wudi
from sapmerge.contrib.adamerging import *
from sapmerge.contrib.clair import *
from sapmerge.contrib.ctm import *
from sapmerge.contrib.emr import *
from sapmerge.contrib.fedlora import *
from sapmerge.contrib.gradpruner import *
from sapmerge.contrib.lorahub import *
from sapmerge.contrib.loraprune import *
from sapmerge.contrib.lorm import *
from sapmerge.contrib.movement import *
from sapmerge.contrib.nsc import *
from sapmerge.contrib.pcb import *
from sapmerge.contrib.pico import *
from sapmerge.contrib.ram import *
from sapmerge.contrib.score import *
from sapmerge.contrib.spectral_surgery import *
from sapmerge.contrib.star import *
from sapmerge.contrib.wudi import *

__all__: list[str] = []
__all__ += _adamerging.__all__
__all__ += _clair.__all__
__all__ += _ctm.__all__
__all__ += _emr.__all__
__all__ += _fedlora.__all__
__all__ += _gradpruner.__all__
__all__ += _lorahub.__all__
__all__ += _loraprune.__all__
__all__ += _lorm.__all__
__all__ += _movement.__all__
__all__ += _nsc.__all__
__all__ += _pcb.__all__
__all__ += _pico.__all__
__all__ += _ram.__all__
__all__ += _score.__all__
__all__ += _spectral_surgery.__all__
__all__ += _star.__all__
__all__ += _wudi.__all__
