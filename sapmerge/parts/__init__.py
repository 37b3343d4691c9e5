"""The primitives: units, bases, scorers, masks, rescalers, transforms and wrappers."""
