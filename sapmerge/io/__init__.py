"""The only code that touches the disk. Files of strangers are read as a closed world:
used, or refused by name.
"""
