"""The only code that touches the disk. Untrusted files are read as a closed world:
used, or refused by name.
"""
